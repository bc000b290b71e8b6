//! Stopping, in the order that loses nothing: say that we are not ready and leave the registry; go on for the settle
//! time, until peers have heard; let inbound requests finish; then tell the command to stop, whose last calls still
//! go out; at last outbound.

use std::{fs::File, process::ExitStatus, sync::Arc, thread, time::Duration};

use anyhow::Result;
use nix::{
    errno::Errno,
    sys::signal::Signal,
    unistd::{getpgrp, tcgetpgrp},
};
use tokio::{
    net::TcpStream,
    signal::unix::{SignalKind, signal},
    sync::{Notify, mpsc},
    task::JoinHandle,
    time::{Instant, sleep, timeout, timeout_at},
};

use super::{
    Drains, Shared,
    publication::{Publication, app_addresses},
    tasks::Tasks,
};
use crate::redirect::{Namespace, NotStarted};

/// How long the settle time waits for the registry. One that hangs is waited for beside all else.
const LEAVE_PATIENCE: Duration = Duration::from_secs(1);
/// How long the command may take to stop after its signal.
const COMMAND_PATIENCE: Duration = Duration::from_secs(10);
/// How long the kernel may take to end a command that was killed.
const KILL_PATIENCE: Duration = Duration::from_secs(1);
/// How long connections may take to end that were told to abort: a turn of their worker.
const ABORT_PATIENCE: Duration = Duration::from_secs(1);
const ABORT_POLL: Duration = Duration::from_millis(5);
/// How often a host's sidecar looks whether its app is gone.
const APP_GONE_POLL: Duration = Duration::from_millis(200);
/// What a shell says of a command that is not there, and of one that cannot be executed (POSIX, 2.8.2).
const NOT_FOUND: u8 = 127;
const NOT_EXECUTABLE: u8 = 126;
pub(super) const FAILED: u8 = 1;

/// Why the sidecar ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// A signal, or a drain over the admin socket. The command gets this signal.
    Asked(Signal),
    /// The command ended by itself or could not be started: with this exit code.
    Command(u8),
    /// What the sidecar needs is not to be had, or is gone.
    Failed,
}

/// Starts the command, makes the workload known, and runs until somebody asks for the end, or the command has ended.
pub(super) async fn running(
    command: Option<&Namespace>,
    publication: &mut Publication,
    signals: &mut mpsc::Receiver<Signal>,
    drain_asked: &Notify,
    shared: &Shared,
) -> End {
    let tasks = &shared.tasks;
    let living = async {
        if let Some(command) = command
            && let Err(error) = command.start_command().await
        {
            tracing::error!("cannot start the command: {error}");
            return End::Command(not_started(&error));
        }
        let ended = async {
            match command {
                Some(command) => End::Command(command.wait().await.map_or_else(
                    |error| {
                        tracing::error!("lost the command: {error}");
                        FAILED
                    },
                    exit_code,
                )),
                None => std::future::pending().await,
            }
        };
        tokio::pin!(ended);
        loop {
            tokio::select! {
                end = &mut ended => return end,
                error = publication.begin() => {
                    tracing::error!("{error:#}");
                    return End::Failed;
                }
                () = shared.leave.asked() => {}
            }
            tracing::info!("asked to leave the registry");
            publication.leave().await;
            shared.leave.done();
        }
    };
    tokio::select! {
        end = living => end,
        end = asked(signals, drain_asked, tasks) => end,
    }
}

/// Waits until somebody asks for the end, or a task is missing.
pub(super) async fn asked(signals: &mut mpsc::Receiver<Signal>, drain_asked: &Notify, tasks: &Tasks) -> End {
    tokio::select! {
        signal = signals.recv() => {
            tracing::info!(?signal, "asked to stop");
            End::Asked(signal.map_or(Signal::SIGTERM, for_the_command))
        }
        () = drain_asked.notified() => {
            tracing::info!("asked to stop over the admin socket");
            End::Asked(Signal::SIGTERM)
        }
        () = tasks.died() => End::Failed,
    }
}

/// A command learns of Ctrl-C as such. SIGQUIT asks the sidecar for a drain, and would make a command dump its memory.
fn for_the_command(signal: Signal) -> Signal {
    if signal == Signal::SIGINT { signal } else { Signal::SIGTERM }
}

/// Finishes what is under way. A second signal ends it at once, and every wait has an end: the settle time begins after
/// [`LEAVE_PATIENCE`] at the latest, the requests and the app of a host then have the drain timeout, and the command has
/// [`COMMAND_PATIENCE`]. The registry is waited for beside them, and takes nothing of their time.
pub(super) async fn drain(
    shared: &Arc<Shared>,
    drains: Drains,
    publication: Publication,
    command: Option<&Namespace>,
    end: End,
    signals: &mut mpsc::Receiver<Signal>,
) -> u8 {
    let Drains { inbound, outbound, workers } = drains;
    let times = &shared.config.drain;
    shared.conditions.serving.set(false);
    let leave = shared.leave.clone();
    let mut leaving = tokio::spawn(async move {
        publication.withdraw().await;
        leave.done();
    });
    let orderly = async {
        let stop_signal = match end {
            End::Command(code) => {
                left(&mut leaving, Instant::now() + times.settle + times.timeout).await;
                return code;
            }
            End::Asked(signal) => signal,
            End::Failed => Signal::SIGTERM,
        };
        let _still_leaving = timeout(LEAVE_PATIENCE, &mut leaving).await;
        sleep(times.settle).await;
        let deadline = Instant::now() + times.timeout;
        tracing::info!("draining: {:?}", inbound.finished(deadline).await);
        let code = match command {
            Some(command) => stop_command(command, stop_signal).await,
            None => {
                let _left = timeout_at(deadline, app_gone(shared)).await;
                0
            }
        };
        tracing::info!("the app's calls: {:?}", outbound.finished(deadline.max(Instant::now())).await);
        left(&mut leaving, deadline).await;
        if end == End::Failed { FAILED } else { code }
    };
    let code = tokio::select! {
        code = orderly => code,
        signal = signals.recv() => {
            tracing::warn!(?signal, "asked again: stopping at once");
            if let Some(command) = command {
                command.signal(Signal::SIGKILL);
            }
            FAILED
        }
    };
    cut_ones_gone(shared).await;
    workers.start();
    code
}

/// Waits until the workload is taken back.
async fn left(leaving: &mut JoinHandle<()>, deadline: Instant) {
    // One that was awaited to its end must not be awaited again.
    if !leaving.is_finished() && timeout_at(deadline, leaving).await.is_err() {
        tracing::warn!("this workload could not be taken back in time; its registration runs out");
    }
}

/// Waits for threads that were told to end; one that does not ends with the process.
pub(super) async fn threads_gone(threads: Vec<thread::JoinHandle<()>>) {
    let deadline = Instant::now() + ABORT_PATIENCE;
    while threads.iter().any(|thread| !thread.is_finished()) && Instant::now() < deadline {
        sleep(ABORT_POLL).await;
    }
    for thread in threads {
        if !thread.is_finished() {
            tracing::error!("a worker does not end and is left behind");
        } else if thread.join().is_err() {
            tracing::error!("a worker ended with a panic");
        }
    }
}

/// Waits until the connections that were told to abort have ended, and with them their records.
async fn cut_ones_gone(shared: &Shared) {
    let (limit, places) = (shared.config.limits.connections, &shared.places);
    let all_free = || {
        let free = [&places.inbound_connections, &places.outbound_connections];
        free.into_iter().all(|places| places.available_permits() == limit)
    };
    let deadline = Instant::now() + ABORT_PATIENCE;
    while !all_free() && Instant::now() < deadline {
        sleep(ABORT_POLL).await;
    }
}

/// Asks the command to stop, and makes it. One that was never started ends as the signal would have ended it.
async fn stop_command(command: &Namespace, signal: Signal) -> u8 {
    if !command.is_begun() {
        return 128 + signal as u8;
    }
    command.signal(if has_it_from_the_terminal(signal) { Signal::SIGTERM } else { signal });
    if let Ok(ended) = timeout(COMMAND_PATIENCE, command.wait()).await {
        return ended.map_or(FAILED, exit_code);
    }
    tracing::warn!("the command did not stop within {COMMAND_PATIENCE:?} and is killed");
    command.signal(Signal::SIGKILL);
    match timeout(KILL_PATIENCE, command.wait()).await {
        Ok(ended) => ended.map_or(FAILED, exit_code),
        Err(_) => FAILED,
    }
}

/// Ctrl-C goes to everybody in the foreground of a terminal, and the command is where we are. Many programs take
/// a second one as an order to end at once.
fn has_it_from_the_terminal(signal: Signal) -> bool {
    let is_foreground = || File::open("/dev/tty").is_ok_and(|tty| tcgetpgrp(tty) == Ok(getpgrp()));
    signal == Signal::SIGINT && is_foreground()
}

/// Waits until the app on this host is gone: its ports refuse connections, wherever it may listen, and it has no
/// connection open. An app that neither takes nor refuses a connection is there.
async fn app_gone(shared: &Shared) {
    let open = || shared.config.limits.connections - shared.places.outbound_connections.available_permits();
    loop {
        let mut listens = false;
        for port in &shared.config.app.ports {
            for address in app_addresses(shared.advertised, *port) {
                let connected = timeout(APP_GONE_POLL, TcpStream::connect(address)).await;
                listens |= !matches!(connected, Ok(Err(_)));
            }
        }
        if !listens && open() == 0 {
            return;
        }
        sleep(APP_GONE_POLL).await;
    }
}

/// What a shell says where exec refused the command; where it did not come to that it is our failure.
/// What a shell says is of the command. What the sidecar did not get for it is the sidecar's own failure, also where the
/// kernel has the same words for that.
fn not_started(why: &NotStarted) -> u8 {
    let NotStarted::NotExecuted(error) = why else { return FAILED };
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT) => NOT_FOUND,
        Some(
            Errno::EACCES
            | Errno::ENOEXEC
            | Errno::EISDIR
            | Errno::ENOTDIR
            | Errno::E2BIG
            | Errno::ELOOP
            | Errno::EINVAL
            | Errno::ENAMETOOLONG
            | Errno::ETXTBSY
            | Errno::ELIBBAD,
        ) => NOT_EXECUTABLE,
        _ => FAILED,
    }
}

fn exit_code(status: ExitStatus) -> u8 {
    use std::os::unix::process::ExitStatusExt;
    let code = status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    u8::try_from(code).unwrap_or(1)
}

/// Begins to listen for signals. Those that ask for the end are told; those that mean the command go there, and `run`,
/// which has none and watches all that it reads, goes on.
pub(super) fn signals(command: Option<&Arc<Namespace>>) -> Result<mpsc::Receiver<Signal>> {
    let (tell, told) = mpsc::channel(4);
    for (kind, name) in [
        (SignalKind::terminate(), Signal::SIGTERM),
        (SignalKind::interrupt(), Signal::SIGINT),
        (SignalKind::quit(), Signal::SIGQUIT),
    ] {
        let mut stream = signal(kind)?;
        let tell = tell.clone();
        tokio::spawn(async move {
            while stream.recv().await.is_some() {
                if tell.send(name).await.is_err() {
                    return;
                }
            }
        });
    }
    for (kind, name) in [
        (SignalKind::hangup(), Signal::SIGHUP),
        (SignalKind::user_defined1(), Signal::SIGUSR1),
        (SignalKind::user_defined2(), Signal::SIGUSR2),
        (SignalKind::window_change(), Signal::SIGWINCH),
    ] {
        let mut stream = signal(kind)?;
        let command = command.cloned();
        tokio::spawn(async move {
            while stream.recv().await.is_some() {
                match &command {
                    Some(command) => command.signal(name),
                    None => tracing::debug!("{name} asks for nothing: services and policies are watched"),
                }
            }
        });
    }
    Ok(told)
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn a_command_that_does_not_start_ends_as_in_a_shell() {
        for (errno, code) in [
            (Errno::ENOENT, 127),
            (Errno::EACCES, 126),
            (Errno::ENOEXEC, 126),
            (Errno::EISDIR, 126),
            (Errno::ENOTDIR, 126),
            (Errno::E2BIG, 126),
            (Errno::ELOOP, 126),
            (Errno::EINVAL, 126),
            (Errno::ETXTBSY, 126),
            // None that exec says of a program, and where the helper does not know.
            (Errno::EAGAIN, 1),
            (Errno::ENOMEM, 1),
            (Errno::EPERM, 1),
            (Errno::ENOSPC, 1),
            (Errno::EIO, 1),
        ] {
            let why = NotStarted::NotExecuted(io::Error::from_raw_os_error(errno as i32));
            assert_eq!(not_started(&why), code, "{errno}");
        }
        assert_eq!(not_started(&NotStarted::NoProcess("EACCES: Permission denied".into())), 1);
    }

    #[tokio::test]
    async fn a_missing_task_is_a_failure_and_nobodys_wish() {
        let (tell, mut signals) = mpsc::channel(1);
        let (drain_asked, tasks) = (Notify::new(), Tasks::default());
        tasks.fail("a task", "it is missing, for this test");
        assert_eq!(asked(&mut signals, &drain_asked, &tasks).await, End::Failed);
        drain_asked.notify_one();
        assert_eq!(asked(&mut signals, &drain_asked, &tasks).await, End::Asked(Signal::SIGTERM));
        tell.send(Signal::SIGINT).await.unwrap();
        assert_eq!(asked(&mut signals, &drain_asked, &tasks).await, End::Asked(Signal::SIGINT));
    }

    #[test]
    fn the_command_is_asked_as_we_were_but_not_to_dump_its_memory() {
        for (signal, expected) in [
            (Signal::SIGTERM, Signal::SIGTERM),
            (Signal::SIGINT, Signal::SIGINT),
            (Signal::SIGQUIT, Signal::SIGTERM),
        ] {
            assert_eq!(for_the_command(signal), expected);
        }
    }
}
