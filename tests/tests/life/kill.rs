//! Kill -9, of an app and of an app with its sidecar: what had no answer yet gets one elsewhere, and a body that was
//! cut is never ended as if it were whole.

use std::{fs, path::Path};

use nix::sys::signal::Signal;
use weft_tests::{Need, Process, can_run, until};

use super::world::{Instance, World, assert_all_answered, can_run_here};

/// Puts an instance to death under load; what the clients saw is asserted.
fn no_get_fails(kill: impl FnOnce(&Instance)) {
    let world = World::new();
    let (dies, stays) = (world.instance("dies", &[]), world.instance("stays", &[]));
    let load = world.load(4, &["http://orders/"]);
    until("both are called", || {
        [&dies, &stays].iter().all(|instance| instance.app.log().matches("GET").count() > 50)
    });
    kill(&dies);
    assert!(assert_all_answered(load) > 400);
    assert!(stays.app.log().matches("GET").count() > dies.app.log().matches("GET").count());
}

#[test]
fn an_app_that_is_killed_fails_no_get() {
    if can_run_here() {
        no_get_fails(|instance| instance.app.signal(Signal::SIGKILL));
    }
}

#[test]
fn an_app_that_is_killed_with_its_sidecar_fails_no_get() {
    if can_run_here() {
        no_get_fails(|instance| {
            instance.sidecar.process.signal(Signal::SIGKILL);
            instance.app.signal(Signal::SIGKILL);
        });
    }
}

/// Downloads that are under way: by Content-Length, chunked, and to a client of HTTP/1.0, for which a clean close
/// would be the end.
fn downloads(world: &World, folder: &Path) -> Vec<(&'static str, Process)> {
    const SLOW: &str = "http://orders/slow?bytes=2000000&seconds=20";
    const CHUNKED: &str = "http://orders/slow?bytes=2000000&seconds=20&chunked=yes";
    let kinds =
        [("length", SLOW, "--http1.1"), ("chunked", CHUNKED, "--http1.1"), ("old", CHUNKED, "--http1.0")];
    let start = |(kind, url, version): (&'static str, &str, &str)| {
        let body = folder.join(kind).display().to_string();
        let curl = world.curl(&[version, "-N", "-o", &body, "-w", "%{http_code}", url]);
        (kind, Process::start("curl", curl))
    };
    let started: Vec<_> = kinds.map(start).into();
    until("all have begun", || {
        kinds.iter().all(|(kind, ..)| fs::metadata(folder.join(kind)).is_ok_and(|body| body.len() > 0))
    });
    started
}

#[test]
fn a_body_that_is_cut_is_told_as_cut() {
    if !can_run_here() {
        return;
    }
    for with_sidecar in [false, true] {
        let world = World::new();
        let instance = world.instance("dies", &[]);
        let downloads = downloads(&world, world.mesh.network.folder());
        if with_sidecar {
            instance.sidecar.process.signal(Signal::SIGKILL);
        }
        instance.app.signal(Signal::SIGKILL);
        for (kind, mut curl) in downloads {
            let code = curl.wait().code();
            // 18: partial file; 56: reset

            let told = code.is_some_and(|code| [18, 56].contains(&code));
            assert!(told && curl.log().contains("200"), "{kind}: {code:?}\n{}", curl.log());
        }
        assert_eq!(instance.app.log().matches("/slow").count(), 3, "none was begun anew");
    }
}

#[test]
fn an_http2_body_that_is_cut_is_told_as_cut() {
    if !can_run_here() || !can_run(&[Need::Program("nginx", "nginx-light")]) {
        return;
    }
    for with_sidecar in [false, true] {
        let world = World::new();
        let mut instance = world.instance("dies", &[]);
        instance.app.signal(Signal::SIGKILL);
        instance.app.wait();
        let folder = world.mesh.network.folder();
        fs::write(folder.join("large"), vec![b'x'; 50_000_000]).unwrap();
        let conf = format!(
            "daemon off; master_process off; pid {f}/pid; error_log stderr; events {{}} \
             http {{ access_log off; server {{ listen 8080 http2; root {f}; }} }}",
            f = folder.display()
        );
        fs::write(folder.join("conf"), conf).unwrap();
        let app = instance.pod.start("nginx", &["-c", &folder.join("conf").display().to_string()]);
        const HTTP2: &str = "--http2-prior-knowledge";
        until("nginx answers", || world.call(&[HTTP2, "-o", "/dev/null", "http://orders/conf"]).1 == 200);
        let body = folder.join("body");
        let mut curl = world.curl(&[HTTP2, "-N", "--limit-rate", "100k", "-o"]);
        curl.arg(&body).arg("http://orders/large");
        let mut curl = Process::start("curl", curl);
        until("it has begun", || fs::metadata(&body).is_ok_and(|body| body.len() > 0));
        if with_sidecar {
            instance.sidecar.process.signal(Signal::SIGKILL);
        }
        app.signal(Signal::SIGKILL);
        assert_eq!(curl.wait().code(), Some(92), "{}", curl.log());
    }
}
