//! Certificates of ten seconds under load, and an authority that is killed and comes back.

use std::{fs, os::unix::fs::PermissionsExt, process::Command};

use weft_proto::names::SIDECAR_UID;
use weft_tests::{Mesh, Pod, Process, output_of, program, program_for_everyone, until};

use super::world::{World, assert_all_answered, can_run_here};

/// A metric without labels, or with them as they are written.
fn metric(from: &Pod, of: &Pod, name: &str) -> Option<f64> {
    let mut curl = from.command_as(SIDECAR_UID, "curl");
    curl.args(["-s", "-m", "5", &format!("http://{}:15020/metrics", of.ipv4())]);
    let text = String::from_utf8(curl.output().ok()?.stdout).ok()?;
    text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}

#[test]
fn metrics_tell_of_renewals_that_fail_and_of_a_certificate_that_is_gone() {
    if !can_run_here() {
        return;
    }
    let mut mesh = Mesh::with_lifetime("6s");
    let pod = mesh.network.pod("web");
    let _sidecar = mesh.sidecar(&pod, "web", &[]);
    let (ok, failed, expiry) = (
        r#"weft_identity_renewals_total{result="ok"}"#,
        r#"weft_identity_renewals_total{result="failed"}"#,
        "weft_certificate_expiry_seconds",
    );
    assert_eq!(metric(&pod, &pod, failed), Some(0.0));
    assert!(metric(&pod, &pod, ok) >= Some(1.0) && metric(&pod, &pod, expiry) > Some(0.0));
    mesh.stop_authority();
    until("the certificate has ended", || metric(&pod, &pod, expiry) == Some(0.0));
    assert!(metric(&pod, &pod, failed) > Some(0.0));
}

#[test]
fn a_sidecar_whose_log_cannot_be_written_goes_on() {
    if !can_run_here() {
        return;
    }
    let mesh = Mesh::with_lifetime("6s");
    let (pod, caller) = (mesh.network.pod("orders"), mesh.network.pod("caller"));
    let (_folder, sidecar) = program_for_everyone(&program("weft-sidecar"));
    let folder = mesh.network.folder().join("sockets");
    fs::create_dir(&folder).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
    let mut exec = pod.command_as(SIDECAR_UID, "sh");
    exec.args(["-c", "exec \"$@\" 2>/dev/full", "sh"])
        .arg(sidecar)
        .arg("exec")
        .args(mesh.membership("orders"));
    exec.args(["--port", "8080", "--advertise", &pod.ipv4().to_string(), "--admin", "0.0.0.0:15020"]);
    exec.arg("--admin-socket").arg(folder.join("admin.sock")).current_dir("/");
    exec.args(["--", "sh", "-c", "exec python3 -m http.server 8080 2>/dev/null"]);
    let mut process = Process::start("exec of orders", exec);
    let get = || {
        let mut curl = caller.command_as(SIDECAR_UID, "curl");
        curl.args(["-s", "-m", "5", "-o", "/dev/null", "-w", "%{http_code}"]);
        curl.arg(format!("http://{}:8080/etc/hostname", pod.ipv4()));
        String::from_utf8(curl.output().unwrap().stdout).unwrap()
    };
    until("it answers", || process.has_ended() || get() == "200");
    // Each renewal is a line of the log: after the third, two more than the first were survived.
    let renewed = r#"weft_identity_renewals_total{result="ok"}"#;
    until("it has renewed twice", || process.has_ended() || metric(&caller, &pod, renewed) >= Some(3.0));
    assert!(!process.has_ended(), "it has ended: {}", process.log());
    assert_eq!(get(), "200");
}

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
