//! The command of `exec`: it is started before anybody hears of it, standard output is its own, and one that cannot run
//! leaves nothing behind. An app that is not there yet is not handed out.

use std::{fs, path::Path, process::Command};

use nix::sys::signal::Signal;
use weft_tests::{Mesh, Need, Process, can_run, output_of, pause, program, program_for_everyone, until};

const NEEDS: [Need; 3] = [Need::Root, Need::Program("ip", "iproute2"), Need::Program("curl", "curl")];

#[test]
fn a_command_that_cannot_run_leaves_nothing_behind() {
    if !can_run(&NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let pod = mesh.network.pod("batch");
    for (command, code) in
        [("/nowhere/to/be/found", 127), ("no-such-program", 127), ("/etc/passwd", 126), ("/etc", 126)]
    {
        let flags = ["--port", "8080", "--instance", "one"];
        let mut exec = mesh.start_exec_under(&[], &pod, "batch", &flags, &[command]);
        assert_eq!(exec.process.wait().code(), Some(code), "{command}:\n{}", exec.process.log());
        assert!(exec.process.log().contains("cannot start the command"), "{}", exec.process.log());
        assert!(!exec.socket().exists(), "{command}: the admin socket stays");
        assert_eq!(fs::read_dir(mesh.services()).expect("the services").count(), 0, "{command}");
    }
}

#[test]
fn a_namespace_that_the_command_cannot_have_is_no_fault_of_the_command() {
    if !can_run(&[Need::Root, Need::Program("ip", "iproute2"), Need::Program("strace", "strace")]) {
        return;
    }
    let mut mesh = Mesh::new();
    for (error, remedy) in
        [("EACCES", "seccomp"), ("EINVAL", "CONFIG_USER_NS"), ("ENOSPC", "user.max_user_namespaces")]
    {
        // Without a certificate the command is not started yet, but all that the helper needs is there.
        mesh.stop_authority();
        let pod = mesh.network.pod(&error.to_lowercase());
        let mut exec = mesh.start_exec_under(&[], &pod, "batch", &[], &["true"]);
        exec.process.wait_for_line("started service=batch");
        let sidecar = exec.process.id();
        let children =
            fs::read_to_string(format!("/proc/{sidecar}/task/{sidecar}/children")).expect("children");
        let helper = children.trim();
        let mut strace = Command::new("strace");
        strace.args(["-f", "-qq", "-p", helper, "-e", "trace=unshare", "-e"]);
        strace.arg(format!("inject=unshare:error={error}"));
        let _strace = Process::start("strace", strace);
        until("the helper is traced", || {
            let status = fs::read_to_string(format!("/proc/{helper}/status")).expect("its status");
            status.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
        });
        mesh.start_authority("24h");
        assert_eq!(exec.process.wait().code(), Some(1), "{error}:\n{}", exec.process.log());
        let log = exec.process.log();
        assert!(log.contains("cannot start the command: the user namespace of the command"), "{log}");
        assert!(log.contains(remedy), "{error}: {log}");
    }
}

#[test]
fn what_cannot_be_published_ends_in_a_drain() {
    if !can_run(&NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let pod = mesh.network.pod("batch");
    let flags = ["--port", "8080", "--services-dir", "/proc"];
    let script = "trap 'echo asked; exit 0' TERM; echo up; while :; do sleep 0.05; done";
    let mut exec = mesh.start_exec_under(&[], &pod, "batch", &flags, &["sh", "-c", script]);
    assert_eq!(exec.process.wait().code(), Some(1), "{}", exec.process.log());
    let log = exec.process.log();
    assert!(log.contains("cannot publish this workload in /proc") && log.contains("asked\n"), "{log}");
    assert!(!exec.socket().exists());
}

#[test]
fn an_app_that_is_not_there_yet_is_not_handed_out() {
    if !can_run(&NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let (_folder, peer) = program_for_everyone(&program("mesh-peer"));
    let go = mesh.network.folder().join("go");
    let flags = ["--port", "8080", "--instance", "one", "--probe", "tcp"];
    let is_published = |service: &str| mesh.services().join(format!("{service}.one.yaml")).exists();

    let script = format!(
        "until [ -e {} ]; do sleep 0.05; done; exec {} app 127.0.0.1:8080",
        go.display(),
        peer.display()
    );
    let pod = mesh.network.pod("exec");
    let _exec = mesh.exec(&pod, "late", &flags, &["sh", "-c", &script]);
    let host = mesh.network.pod("run");
    let _run = mesh.sidecar(&host, "later", &flags);
    let trusted = mesh.network.pod("trusted");
    let _trusted = mesh.sidecar(&trusted, "trusted", &["--port", "8080", "--instance", "one"]);
    until("an app that is not probed is handed out", || is_published("trusted"));
    (0..25).for_each(|_| pause());
    assert!(!is_published("late") && !is_published("later"));

    fs::write(&go, "").expect("a file");
    until("the app of exec is handed out", || is_published("late"));
    let _app = host.start(peer.display().to_string(), &["app", "127.0.0.1:8080"]);
    until("the app of the host is handed out", || is_published("later"));
}

#[test]
fn standard_output_belongs_to_the_command() {
    if !can_run(&NEEDS) {
        return;
    }
    let mesh = Mesh::new();
    let (pod, client) = (mesh.network.pod("server"), mesh.network.pod("client"));
    let (_folder, peer) = program_for_everyone(&program("mesh-peer"));
    // A folder where the sidecar's user may write.
    let output = mesh.services().join("output");
    let redirected = format!("exec \"$@\" >{}", output.display());
    let wrapper = ["sh", "-c", &redirected, "sh"];
    let script = format!("echo mine; exec {} app 127.0.0.1:8080 >&2", peer.display());
    let mut exec =
        mesh.start_exec_under(&wrapper, &pod, "orders", &["--port", "8080"], &["sh", "-c", &script]);
    exec.process.wait_for_line("serving");
    let mut curl = client.command("curl");
    curl.args(["-s", "-m", "5", &format!("http://{}:8080/", pod.ipv4())]);
    output_of(curl);
    until("the access log is on standard error", || {
        exec.process.log().lines().any(|line| line.contains("\"kind\":\"request\""))
    });
    // Neither the sidecar nor its helper keeps it open: its reader sees the end when the command closes it.
    let target = |process: &str, number: u8| fs::read_link(format!("/proc/{process}/fd/{number}")).ok();
    let sidecar = exec.process.id().to_string();
    let helper = fs::read_to_string(format!("/proc/{sidecar}/task/{sidecar}/children")).expect("children");
    for process in [&sidecar, helper.trim()] {
        let [one, two] = [1, 2].map(|number| target(process, number));
        assert!(one.is_some() && one == two, "{process}: {one:?}, {two:?}");
    }
    exec.process.signal(Signal::SIGTERM);
    exec.process.wait();
    assert_eq!(fs::read_to_string(&output).expect("the output"), "mine\n");
}

#[test]
fn a_command_that_has_ended_gets_no_signal() {
    if !can_run(&[Need::Root, Need::Program("ip", "iproute2"), Need::Program("strace", "strace")]) {
        return;
    }
    let mesh = Mesh::new();
    let pod = mesh.network.pod("batch");
    let trace = mesh.services().join("trace");
    let path = trace.display().to_string();
    let wrapper = ["strace", "-f", "-qq", "-e", "trace=kill,wait4,waitid", "-o", &path];
    let command = ["sh", "-c", "exit 5"];
    let mut exec = mesh.start_exec_under(&wrapper, &pod, "batch", &[], &command);
    assert_eq!(exec.process.wait().code(), Some(5), "{}", exec.process.log());
    let calls = fs::read_to_string(Path::new(&path)).expect("the trace");
    assert!(calls.contains("WEXITSTATUS(s) == 5"), "the command was reaped:\n{calls}");
    // Its number may be another process's by then.
    assert!(!calls.lines().any(|line| line.contains("kill(") && line.contains("SIGTERM")), "{calls}");
}
