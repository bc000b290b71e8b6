//! A sidecar that is frozen: it is there, it acknowledges, and it says nothing.

use nix::sys::signal::Signal;
use weft_tests::output_of;

use super::world::{World, can_run_here};

#[test]
fn a_frozen_sidecar_is_found_out_while_a_call_waits() {
    if !can_run_here() {
        return;
    }
    let world = World::new();
    let one = world.instance("one", &[]);
    one.sidecar.process.signal(Signal::SIGSTOP);
    // Not repeated: it may have been processed. Without the question after 10 seconds it would wait for ever.
    let answer = output_of(world.curl(&["-m", "60", "-i", "-d", "question", "http://orders/"]));
    let failure = world.sidecar.wait_for_failure("reset", &[]);
    one.sidecar.process.signal(Signal::SIGCONT);
    assert!(answer.to_lowercase().contains("x-weft-failure: reset\r\n"), "{answer}");
    assert!(failure["detail"].as_str().is_some_and(|detail| detail.contains("silent")), "{failure}");
    let seconds = failure["duration_seconds"].as_f64().expect("a duration");
    assert!((10.0..50.0).contains(&seconds), "{failure}");
}
