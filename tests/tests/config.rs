//! Bad configuration, told by the real program: every mistake in one message, exit code 2, nothing started.

use std::{
    fs,
    io::Write,
    process::{Command, Stdio},
};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use weft_tests::program;

#[test]
fn all_mistakes_stand_in_one_message() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("weft.yaml");
    fs::write(&file, "service: orders\nserivces-dir: /\nworkers: many\nsettle-time: soon\n").unwrap();
    let shown = file.display().to_string();
    for command in [&["run"][..], &["exec"], &["check"]] {
        let mut weft = Command::new(program("weft-sidecar"));
        weft.env_clear().env("WEFT_MODE", "allow").env("WEFT_SERIVCE", "x").args(command);
        weft.args(["--config", &shown, "--inbound-port", "8080", "--port", "8080"]);
        weft.args(["--authority", "ca:15080", "--authority-root", "/nowhere/root.pem"]);
        weft.args(["--token-file", "/nowhere/token"]);
        if command == ["exec"] {
            weft.args(["--", "true"]);
        }
        let output = weft.output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{command:?}: {told}");
        assert!(output.stdout.is_empty());
        for expected in [
            &format!("{shown}:2: `serivces-dir` is no setting"),
            &format!("{shown}:3: `workers` is \"many\""),
            &format!("{shown}:4: `settle-time` is \"soon\""),
            "WEFT_MODE: `mode` is \"allow\" (unknown); expected allow-any or registry-only",
            "WEFT_SERIVCE: no such setting",
            "--port: port 8080 is taken by --inbound-port",
            "/nowhere/root.pem",
            "--token-file: `token-file` is \"/nowhere/token\" (No such file",
        ] {
            assert!(told.contains(expected), "{command:?}: {expected}\nis not in\n{told}");
        }
    }
}

#[test]
fn a_sound_configuration_is_not_refused() {
    let mut weft = Command::new(program("weft-sidecar"));
    let output = weft.env_clear().args(["check", "--service", "orders"]).output().unwrap();
    assert_ne!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn output_that_nobody_can_take_is_no_panic() {
    for words in [&["version"][..], &["redirect", "plan"], &["check", "--service", "orders"]] {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let output = Command::new(program("weft-sidecar")).args(words).stdout(full).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{words:?}: {said}");
        assert!(said.contains("standard output: "), "{words:?}: {said}");
    }
}

/// A full pipe that nobody reads: what happened is lost, but the exit code comes.
#[test]
fn a_failed_start_does_not_wait_for_a_stuck_standard_error() {
    let (_reader, mut pipe) = std::io::pipe().unwrap();
    let set = |pipe: &std::io::PipeWriter, flags| fcntl(pipe, FcntlArg::F_SETFL(flags)).unwrap();
    set(&pipe, OFlag::O_NONBLOCK);
    while pipe.write(&[b'\n'; 4096]).is_ok() {}
    while pipe.write(b"\n").is_ok() {}
    set(&pipe, OFlag::empty());
    for (name, words, code) in [
        ("weft-sidecar", &["run", "--service", "no name"][..], 2),
        ("weft-sidecar", &["run", "--service", "web", "--workers", "1", "--admin", "192.0.2.1:15020"], 1),
        ("weft-ca", &["root", "--dir", "/nowhere"], 2),
        ("weft-ca", &["serve", "--dir", "/nowhere"], 2),
    ] {
        let mut weft = Command::new(program(name));
        let errors = Stdio::from(pipe.try_clone().unwrap());
        let mut started = weft.args(words).stdout(Stdio::null()).stderr(errors).spawn().unwrap();
        let mut ended = None;
        let mut rounds = 0..500;
        while ended.is_none() && rounds.next().is_some() {
            weft_tests::pause();
            ended = started.try_wait().unwrap();
        }
        let _ = started.kill();
        assert_eq!(ended.and_then(|status| status.code()), Some(code), "{name} {words:?}");
        let _ = started.wait();
    }
}
