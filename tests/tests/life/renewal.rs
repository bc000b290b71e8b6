//! Certificates of ten seconds under load, and an authority that is killed and comes back.

use std::process::Command;

use weft_tests::{Mesh, output_of, until};

use super::world::{World, assert_all_answered, can_run_here};

fn certificates(sidecar: &weft_tests::Sidecar) -> usize {
    sidecar.process.log().matches("a certificate was obtained").count()
}

#[test]
fn renewals_under_load_fail_no_request_and_an_authority_may_be_away() {
    if !can_run_here() {
        return;
    }
    let mut world = World::in_mesh(Mesh::with_lifetime("10s"));
    let instance = world.instance("one", &[]);
    let body = world.mesh.network.folder().join("posted").display().to_string();
    std::fs::write(&body, "posted").unwrap();
    let gets = world.load(20, &["http://orders/"]);
    let posts = world.load(20, &["-d", &body, "http://orders/upload"]);
    until("both have renewed", || certificates(&world.sidecar) > 1 && certificates(&instance.sidecar) > 1);
    world.mesh.stop_authority();
    until("they miss the authority", || {
        world.sidecar.process.log().contains("no certificate was obtained")
            && instance.sidecar.process.log().contains("no certificate was obtained")
    });
    let before = certificates(&world.sidecar).max(certificates(&instance.sidecar));
    world.mesh.start_authority("10s");
    until("new certificates have come", || {
        certificates(&world.sidecar) > before && certificates(&instance.sidecar) > before
    });
    let mut show = Command::new(weft_tests::program("weft-sidecar"));
    show.args(["show", "certificate", "--admin-socket"]).arg(world.sidecar.socket());
    assert!(output_of(show).contains("spiffe://"));
    assert!(assert_all_answered(gets) > 1000);
    assert!(assert_all_answered(posts) > 1000);
    assert!(!world.sidecar.process.log().contains("has expired"));
}
