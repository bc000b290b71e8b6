//! One worker: a thread with a runtime, listeners and pools of its own. Workers share endpoint state and
//! snapshots, and nothing that waits.

use std::{net::TcpListener as StdListener, sync::Arc, time::Duration};

use tokio::{net::TcpListener, runtime, task::JoinSet, time::Instant};

use super::{Drainings, Shared};
use crate::{
    connect::{Connector, Dialer, Pool},
    http::HttpLimits,
    inbound::{Delivery, Inbound},
    model::{Failed, Failure},
    outbound::Outbound,
    serve::{self, Cap, Incident},
    telemetry::Direction,
};

/// How often idle connections are looked for.
const SWEEP: Duration = Duration::from_secs(10);

/// The listeners of one worker.
#[derive(Default)]
pub(super) struct Listeners {
    pub(super) inbound: Vec<StdListener>,
    pub(super) outbound: Vec<StdListener>,
}

/// Carries traffic until both groups have drained.
pub(super) fn run(shared: &Arc<Shared>, listeners: Listeners, delivery: Delivery, drainings: Drainings) {
    let runtime = match runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return shared.tasks.fail("worker", &format!("it cannot start: {error}")),
    };
    runtime.block_on(carry(shared, listeners, delivery, drainings));
}

async fn carry(shared: &Arc<Shared>, listeners: Listeners, delivery: Delivery, drainings: Drainings) {
    let Drainings { inbound: inbound_draining, outbound: outbound_draining, workers: mut end } = drainings;
    let inbound = inbound(shared, delivery);
    let outbound = outbound(shared, inbound.clone());
    let pools = [inbound.pool.clone(), outbound.pool.clone()];
    for pool in pools {
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(SWEEP).await;
                pool.sweep(Instant::now()).await;
            }
        });
    }
    let mut loops = JoinSet::new();
    for listener in taken_over(listeners.inbound) {
        let (story, draining) = (inbound.clone(), inbound_draining.clone());
        let connection_draining = draining.clone();
        loops.spawn(serve::accept_within(
            listener,
            Cap {
                places: shared.places.inbound_connections.clone(),
                when_full: shared.places.when_full,
                idle: Some(shared.places.inbound_idle.clone()),
            },
            draining,
            tell(shared, Direction::Inbound),
            move |stream, client| story.clone().connection(stream, client, connection_draining.clone()),
        ));
    }
    for listener in taken_over(listeners.outbound) {
        let (story, draining) = (outbound.clone(), outbound_draining.clone());
        let connection_draining = draining.clone();
        loops.spawn(serve::accept_within(
            listener,
            Cap {
                places: shared.places.outbound_connections.clone(),
                when_full: shared.places.when_full,
                idle: None,
            },
            draining,
            tell(shared, Direction::Outbound),
            move |stream, client| story.clone().connection(stream, client, connection_draining.clone()),
        ));
    }
    // Held by the loops and their connections from here on: a group has drained when the last of them is gone.
    drop((inbound_draining, outbound_draining));
    let dead = async {
        while let Some(ended) = loops.join_next().await {
            if ended.is_err() {
                return;
            }
        }
        std::future::pending().await
    };
    tokio::select! {
        () = end.started() => return,
        () = dead => shared.tasks.fail("accept loop", "it ended with a panic, a bug of ours"),
    }
    end.started().await;
}

fn taken_over(listeners: Vec<StdListener>) -> Vec<TcpListener> {
    let take = |listener| match TcpListener::from_std(listener) {
        Ok(listener) => Some(listener),
        Err(error) => {
            tracing::error!(%error, "a listener cannot be used");
            None
        }
    };
    listeners.into_iter().filter_map(take).collect()
}

/// What an accept loop met. A connection over the cap is refused like any other, or waits, of which the log tells; where descriptors run out, those of
/// some connections that nobody uses are freed; a panic is a bug of ours, which the record of the connection has counted.
fn tell(shared: &Arc<Shared>, direction: Direction) -> impl Fn(Incident) + Clone + Send + 'static {
    let (telemetry, reclaimer) = (shared.telemetry.clone(), shared.reclaimer.clone());
    move |incident| match incident {
        Incident::NoDescriptor => reclaimer.reclaim(),
        Incident::Full(client) => {
            let full = Failed::new(Failure::Overloaded, "the bound of connections at a time is reached");
            telemetry.connection(direction, client).fail(full);
        }
        Incident::Waits(client) => tracing::warn!(
            %client,
            direction = direction.label(),
            "clients wait, as the bound of connections at a time is reached and the limit of open files allows no more. \
             Raise the hard limit (`ulimit -Hn`, LimitNOFILE=)"
        ),
        Incident::Panicked(client) => {
            tracing::error!(%client, direction = direction.label(), "the task of a connection panicked");
        }
    }
}

fn limits(shared: &Shared) -> HttpLimits {
    let limits = &shared.config.limits;
    HttpLimits {
        header_bytes: limits.header_bytes,
        header_fields: limits.header_fields,
        header_timeout: limits.header_timeout,
        idle_timeout: limits.idle_timeout,
        drain_timeout: shared.config.drain.timeout,
        concurrent_streams: limits.streams,
        ..HttpLimits::default()
    }
}

fn inbound(shared: &Arc<Shared>, delivery: Delivery) -> Arc<Inbound> {
    let connector =
        Connector::new(shared.app_dialer.clone(), shared.credentials.clone(), shared.config.drain.timeout)
            .with_expired_peers(shared.config.expired_peers)
            .with_reclaimer(shared.reclaimer.clone());
    let service = shared.config.own.service.as_str();
    Arc::new(Inbound {
        delivery,
        pool: Pool::new(connector.clone(), shared.telemetry.metrics().clone()),
        connector,
        credentials: shared.credentials.clone(),
        limits: limits(shared),
        requests: shared.places.inbound_requests.clone(),
        silent: shared.places.inbound_silent.clone(),
        buffers: shared.places.inbound_buffers.clone(),
        idle: shared.places.inbound_idle.clone(),
        metrics: shared.telemetry.metrics().service(Direction::Inbound, service, ""),
        telemetry: shared.telemetry.clone(),
    })
}

fn outbound(shared: &Arc<Shared>, inbound: Arc<Inbound>) -> Arc<Outbound> {
    let config = &shared.config;
    let connector = Connector::new(Dialer::Direct, shared.credentials.clone(), config.drain.timeout)
        .with_expired_peers(config.expired_peers)
        .with_reclaimer(shared.reclaimer.clone());
    let explicit =
        config.upstreams.iter().map(|upstream| (upstream.listen, upstream.service.clone())).collect();
    Arc::new(Outbound {
        directory: shared.directory.clone(),
        registry: shared.registry.clone(),
        virtual_addresses: shared.virtual_addresses.clone(),
        explicit,
        upstreams: shared.upstreams.clone(),
        pool: Pool::new(connector.clone(), shared.telemetry.metrics().clone()),
        connector,
        inbound,
        mode: config.mode,
        own_ports: config.own_ports(),
        limits: limits(shared),
        requests: shared.places.outbound_requests.clone(),
        telemetry: shared.telemetry.clone(),
    })
}
