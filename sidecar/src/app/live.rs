//! Running: everything started in the order in which the sidecar becomes ready, then the wait for a reason to end.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::Result;
use tokio::{
    net::TcpListener,
    sync::Notify,
    time::{Instant, sleep},
};

use super::{
    Parts, Shared,
    build::Sockets,
    publication::Publication,
    sources::{start_dns, start_faces, start_sources},
    stop::{FAILED, asked, drain, running, signals, threads_gone},
    worker,
};
/// After this long the log says what is still missing for readiness.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// The longest wait for the last spans and log lines.
const FLUSH_PATIENCE: Duration = Duration::from_secs(3);

impl Parts {
    pub(super) async fn live(self) -> Result<u8> {
        let Parts { shared, sockets, command, senders, span_export, drains, drainings } = self;
        let drain_asked = Arc::new(Notify::new());
        let mut signals = signals(command.as_ref())?;
        let Sockets {
            workers,
            dns_udp,
            dns_tcp,
            admin,
            admin_socket,
            admin_socket_file: _removed_at_the_end,
            delivery,
        } = sockets;
        start_sources(&shared, senders, span_export);
        start_dns(&shared, dns_udp, dns_tcp)?;
        let admin_address = admin.local_addr()?;
        start_faces(&shared, TcpListener::from_std(admin)?, admin_socket, &drain_asked);
        let mut threads = Vec::new();
        for (number, listeners) in workers.into_iter().enumerate() {
            let (shared, delivery, drainings) = (shared.clone(), delivery.clone(), drainings.clone());
            let thread = thread::Builder::new().name(format!("worker-{number}"));
            threads.push(thread.spawn(move || {
                let running = AssertUnwindSafe(|| worker::run(&shared, listeners, delivery, drainings));
                if catch_unwind(running).is_err() {
                    shared.tasks.fail("worker", "it ended with a panic, a bug of ours");
                }
            })?);
        }
        drop(drainings);
        shared.conditions.serving.set(true);
        tracing::info!(
            service = %shared.config.own.service,
            instance = %shared.config.own.instance,
            admin = %admin_address,
            admin_socket = %shared.config.ports.admin_socket.display(),
            "started"
        );
        let mut publication = Publication::none();
        let early = tokio::select! {
            () = ready(&shared) => None,
            end = asked(&mut signals, &drain_asked, &shared.tasks) => Some(end),
        };
        let end = match early {
            Some(end) => end,
            None => {
                publication = Publication::of(&shared);
                running(command.as_deref(), &mut publication, &mut signals, &drain_asked, &shared).await
            }
        };
        let code = drain(&shared, drains, publication, command.as_deref(), end, &mut signals).await;
        threads_gone(threads).await;
        shared.telemetry.flush(FLUSH_PATIENCE).await;
        // Whoever started us shall start us again.
        Ok(if shared.tasks.is_one_dead() { FAILED } else { code })
    }
}

/// Waits until every condition is met.
async fn ready(shared: &Shared) {
    let start = Instant::now();
    let mut told = false;
    loop {
        let missing = shared.readiness.missing();
        if missing.is_empty() {
            return tracing::info!(took = ?start.elapsed(), "ready");
        }
        if start.elapsed() > START_PATIENCE && !told {
            tracing::warn!(?missing, "still not ready");
            told = true;
        }
        sleep(Duration::from_millis(2)).await;
    }
}
