//! Stopping, in the order that loses nothing: say that we are not ready and leave the registry; go on for the settle
//! time, until peers have heard; let inbound requests finish; then tell the command to stop, whose last calls still
//! go out; at last outbound.

use std::{net::SocketAddr, process::ExitStatus, sync::Arc, time::Duration};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{Notify, mpsc},
    time::{Instant, sleep, timeout},
};

use super::{Drains, Shared, publication::Publication};
use crate::redirect::Namespace;

/// How long the command may take to stop after its signal.
const COMMAND_PATIENCE: Duration = Duration::from_secs(10);
/// How long connections may take to end that were told to abort: a turn of their worker.
const ABORT_PATIENCE: Duration = Duration::from_secs(1);
const ABORT_POLL: Duration = Duration::from_millis(5);
/// How often a host's sidecar looks whether its app is gone.
const APP_GONE_POLL: Duration = Duration::from_millis(200);

/// Why the sidecar ends.
pub(super) enum End {
    /// A signal, or a drain over the admin socket.
    Asked,
    /// The command ended by itself, with this exit code.
    Command(u8),
}

/// Runs until somebody asks for the end, or the command has ended.
pub(super) async fn running(
    command: Option<&Namespace>,
    signals: &mut mpsc::Receiver<Signal>,
    drain_asked: &Notify,
) -> Result<End> {
    let Some(command) = command else {
        asked(signals, drain_asked).await;
        return Ok(End::Asked);
    };
    command.start_command().await.context("cannot start the command")?;
    tokio::select! {
        ended = command.wait() => Ok(End::Command(exit_code(ended.context("lost the command")?))),
        () = asked(signals, drain_asked) => Ok(End::Asked),
    }
}

pub(super) async fn asked(signals: &mut mpsc::Receiver<Signal>, drain_asked: &Notify) {
    tokio::select! {
        signal = signals.recv() => tracing::info!(?signal, "asked to stop"),
        () = drain_asked.notified() => tracing::info!("asked to stop over the admin socket"),
    }
}

/// Finishes what is under way. A second signal ends it at once.
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
    let orderly = async {
        publication.withdraw().await;
        if let End::Command(code) = end {
            return code;
        }
        sleep(times.settle).await;
        let deadline = Instant::now() + times.timeout;
        tracing::info!("draining: {:?}", inbound.finished(deadline).await);
        let code = match command {
            Some(command) => stop_command(command).await,
            None => {
                app_gone(shared, deadline).await;
                0
            }
        };
        tracing::info!("the app's calls: {:?}", outbound.finished(deadline.max(Instant::now())).await);
        code
    };
    let code = tokio::select! {
        code = orderly => code,
        signal = signals.recv() => {
            tracing::warn!(?signal, "asked again: stopping at once");
            if let Some(command) = command {
                command.signal(Signal::SIGKILL);
            }
            1
        }
    };
    cut_ones_gone(shared).await;
    workers.start();
    code
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

/// Asks the command to stop, and makes it.
async fn stop_command(command: &Namespace) -> u8 {
    command.signal(Signal::SIGTERM);
    match timeout(COMMAND_PATIENCE, command.wait()).await {
        Ok(Ok(status)) => exit_code(status),
        Ok(Err(_)) => 1,
        Err(_) => {
            tracing::warn!("the command did not stop within {COMMAND_PATIENCE:?} and is killed");
            command.signal(Signal::SIGKILL);
            command.wait().await.map_or(1, exit_code)
        }
    }
}

/// Waits until the app on this host is gone: its ports refuse connections and it has no connection open.
async fn app_gone(shared: &Shared, deadline: Instant) {
    let open = || shared.config.limits.connections - shared.places.outbound_connections.available_permits();
    while Instant::now() < deadline {
        let mut listens = false;
        for port in &shared.config.app.ports {
            let address = SocketAddr::from(([127, 0, 0, 1], *port));
            listens |= tokio::net::TcpStream::connect(address).await.is_ok();
        }
        if !listens && open() == 0 {
            return;
        }
        sleep(APP_GONE_POLL).await;
    }
}

fn exit_code(status: ExitStatus) -> u8 {
    use std::os::unix::process::ExitStatusExt;
    let code = status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    u8::try_from(code).unwrap_or(1)
}

pub(super) fn signals() -> Result<mpsc::Receiver<Signal>> {
    let (tell, told) = mpsc::channel(4);
    for (kind, name) in
        [(SignalKind::terminate(), Signal::SIGTERM), (SignalKind::interrupt(), Signal::SIGINT)]
    {
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
    Ok(told)
}
