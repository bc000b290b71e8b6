//! SIGTERM: the workload leaves the services folder, what is under way ends, the app's own last calls go out.

use nix::sys::signal::Signal;
use weft_tests::{Process, pause, until};

use super::world::{Instance, World, can_run_here};

/// curl from the client's pod as a stranger: past the client's sidecar, straight to the instance.
fn dial_fails(world: &World, instance: &Instance) -> bool {
    let mut curl = world.client.command_as(weft_proto::names::SIDECAR_UID, "curl");
    curl.args(["-s", "-m", "2", "-o", "/dev/null", &format!("http://{}:8080/", instance.pod.ipv4())]);
    curl.status().expect("curl").code() == Some(7)
}

#[test]
fn downloads_in_flight_complete_and_newcomers_are_refused() {
    if !can_run_here() {
        return;
    }
    let world = World::new();
    let mut instance = world.instance("one", &[]);
    let folder = world.mesh.network.folder().join("body");
    let downloads = world.curl(&[
        "-Z",
        "--parallel-immediate",
        "--parallel-max",
        "50",
        "-w",
        "%{http_code} %{size_download}\n",
        "-o",
        &format!("{}#1", folder.display()),
        "http://orders/slow?bytes=100000&seconds=4&number=[1-50]",
    ]);
    let mut downloads = Process::start("curl", downloads);
    until("all are in flight", || instance.app.log().matches("/slow").count() == 50);
    instance.sidecar.process.signal(Signal::SIGTERM);
    until("the workload is taken away", || !world.document("orders", "one").exists());
    until("newcomers are refused", || dial_fails(&world, &instance));
    assert!(!downloads.has_ended() && !instance.sidecar.process.has_ended(), "in this order");
    // 6: the name stands for nothing any more
    until("a new request hears of it", || {
        world.curl(&["http://orders/"]).status().unwrap().code() == Some(6)
    });
    assert!(downloads.wait().success(), "{}", downloads.log());
    assert_eq!(downloads.log().matches("200 100000").count(), 50, "{}", downloads.log());
    assert!(!instance.sidecar.process.has_ended(), "the app may still call");
    instance.app.signal(Signal::SIGTERM);
    assert_eq!(instance.sidecar.process.wait().code(), Some(0), "{}", instance.sidecar.process.log());
}

/// A download that would take a minute, and the sidecar asked to stop.
fn stop_under_way(world: &World, instance: &Instance) -> Process {
    let body = world.mesh.network.folder().join("body").display().to_string();
    let curl = world.curl(&["-N", "-o", &body, "http://orders/slow?bytes=100000&seconds=60"]);
    let download = Process::start("curl", curl);
    until("it is in flight", || instance.app.log().contains("/slow"));
    instance.sidecar.process.signal(Signal::SIGTERM);
    until("the workload is taken away", || !world.document("orders", "one").exists());
    download
}

/// curl's exit codes for a partial file and for a reset.
fn assert_cut(download: &mut Process) {
    assert!(matches!(download.wait().code(), Some(18 | 56)), "{}", download.log());
}

/// The record of the download says that the drain cut it, not that its client went away.
fn assert_told(instance: &Instance) {
    let log = instance.sidecar.access_log();
    let download = log.iter().find(|line| line["path"] == "/slow");
    assert!(download.is_some_and(|line| line["failure"] == "draining"), "{log:?}");
}

#[test]
fn a_second_signal_ends_at_once() {
    if !can_run_here() {
        return;
    }
    let world = World::new();
    let mut instance = world.instance("one", &[]);
    let mut download = stop_under_way(&world, &instance);
    for _ in 0..10 {
        pause();
    }
    assert!(!instance.sidecar.process.has_ended());
    instance.sidecar.process.signal(Signal::SIGTERM);
    assert_eq!(instance.sidecar.process.wait().code(), Some(1), "{}", instance.sidecar.process.log());
    assert_cut(&mut download);
    assert_told(&instance);
}

#[test]
fn the_deadline_of_a_drain_holds() {
    if !can_run_here() {
        return;
    }
    let world = World::new();
    let mut instance = world.instance("one", &["--drain-timeout", "1s"]);
    let mut download = stop_under_way(&world, &instance);
    assert_eq!(instance.sidecar.process.wait().code(), Some(0), "{}", instance.sidecar.process.log());
    assert_cut(&mut download);
    assert_told(&instance);
}

#[test]
fn the_last_calls_of_a_command_go_out() {
    if !can_run_here() {
        return;
    }
    let world = World::new();
    let instance = world.instance("one", &[]);
    let pod = world.mesh.network.pod("batch");
    let mut exec = pod.command(weft_tests::program("weft-sidecar"));
    let socket = world.mesh.network.folder().join("batch.sock").display().to_string();
    exec.arg("exec").args(world.mesh.membership("batch"));
    exec.args(["--port", "8080", "--instance", "one", "--admin-socket", &socket]);
    exec.args([
        "--advertise",
        &pod.ipv4().to_string(),
        "--",
        "python3",
        &world.app(),
        "8080",
        "batch",
        "orders",
    ]);
    let mut exec = Process::start("exec", exec);
    exec.wait_for_line("listening");
    until("it is reached", || world.call(&["http://batch/"]) == ("batch".to_owned(), 200));
    exec.signal(Signal::SIGTERM);
    assert_eq!(exec.wait().code(), Some(7), "the exit code of the command:\n{}", exec.log());
    assert!(exec.log().contains("last call: (200, b'one')"), "{}", exec.log());
    assert!(instance.app.log().contains("GET /last"));
    assert!(!world.document("batch", "one").exists());
}
