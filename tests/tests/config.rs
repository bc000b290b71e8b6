//! Bad configuration, told by the real program: every mistake in one message, exit code 2, nothing started.

use std::{fs, process::Command};

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
