//! Our own workload, made known to others: a file in the services directory, a registration in Consul, or both;
//! and the probe of the app that the registration tells of.

use std::{
    future::pending,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Error, Result, bail};
use bytes::Bytes;
use http_body_util::Empty;
use hyper::{Request, client::conn::http1, header::HOST};
use hyper_util::rt::TokioIo;
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use super::Shared;
use crate::{
    config::ProbeKind,
    connect::Dialer,
    discovery::{
        consul::{self, OwnRegistration, Registration},
        publish::{self, Published, Workload},
    },
    model::{DEFAULT_WEIGHT, Endpoint},
    net::Reclaimer,
    policy::health::Health,
};

/// For one probe of the app.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

/// Where others can find our workload.
#[derive(Default)]
pub(super) struct Publication {
    wanted: Option<Wanted>,
    file: Option<Published>,
    consul: Option<OwnRegistration>,
}

/// What is to be made known.
struct Wanted {
    shared: Arc<Shared>,
    workload: Workload,
}

impl Publication {
    /// Nothing is made known.
    pub(super) fn none() -> Publication {
        Publication::default()
    }

    /// The workload, to be made known wherever the settings say. Nothing where it has no port.
    pub(super) fn of(shared: &Arc<Shared>) -> Publication {
        let config = &shared.config;
        let Some(port) = config.app.ports.first().copied().filter(|_| config.stores.publish) else {
            shared.registered.send_replace(true);
            return Publication::none();
        };
        let identities = shared.credentials.borrow().iter().map(|own| own.id().clone()).collect();
        let endpoint = Endpoint {
            zone: config.own.zone.as_deref().map(Into::into),
            version: config.app.version.as_deref().map(Into::into),
            tags: config.app.tags.iter().map(|tag| tag.as_str().into()).collect(),
            weight: config.app.weight.unwrap_or(DEFAULT_WEIGHT),
            ..Endpoint::at((shared.advertised, port).into())
        };
        let workload = Workload {
            service: config.own.service.clone(),
            instance: config.own.instance.clone(),
            protocol: config.app.protocol,
            identities,
            endpoint,
        };
        Publication { wanted: Some(Wanted { shared: shared.clone(), workload }), ..Publication::none() }
    }

    /// Makes it known: to Consul at once, with the health of the app; in the services directory, which knows no
    /// health, when the app has answered its probe once. Returns only with an error. Safe to cancel; what was made
    /// known by then stays until [`Publication::withdraw`].
    pub(super) async fn begin(&mut self) -> Error {
        let Some(Wanted { shared, workload }) = self.wanted.take() else { return pending().await };
        let config = &shared.config;
        let health = follow_app(&shared, workload.endpoint.address);
        if let Some((client, settings)) = shared.consul.clone().zip(config.stores.consul.as_ref()) {
            let registration = Registration {
                workload: workload.clone(),
                weight: config.app.weight,
                ttl: settings.ttl,
                deregister_after: settings.deregister_after,
            };
            self.consul = Some(consul::register(
                client,
                registration,
                health.clone(),
                shared.registered.clone(),
                fastrand::Rng::new(),
            ));
        }
        let Some(folder) = &config.stores.services else {
            if self.consul.is_none() {
                shared.registered.send_replace(true);
            }
            return pending().await;
        };
        // The sender goes only after the last receiver.
        let mut health = health;
        let _answers = health.wait_for(|is_well| *is_well).await.is_ok();
        drop(health);
        match publish::publish(folder, &workload) {
            Ok(published) => {
                self.file = Some(published);
                if self.consul.is_none() {
                    shared.registered.send_replace(true);
                }
            }
            Err(error) => {
                let place = format!("cannot publish this workload in {}", folder.display());
                return Error::new(error).context(place);
            }
        }
        pending().await
    }

    /// Takes the workload back everywhere, for good: afterwards there is nothing to make known any more.
    pub(super) async fn leave(&mut self) {
        std::mem::take(self).withdraw().await;
    }

    /// Takes the workload back everywhere.
    pub(super) async fn withdraw(self) {
        // First, as nothing has to answer for it.
        if let Some(file) = self.file
            && let Err(error) = file.withdraw().await
        {
            tracing::warn!("this workload cannot be taken back: {error}");
        }
        if let Some(registered) = self.consul {
            registered.withdraw().await;
        }
    }
}

/// Where an app may listen that is asked whether it is there, in the order in which it is asked.
pub(super) fn app_addresses(advertised: IpAddr, port: u16) -> [SocketAddr; 3] {
    [Ipv4Addr::LOCALHOST.into(), advertised, Ipv6Addr::LOCALHOST.into()].map(|ip| SocketAddr::new(ip, port))
}

/// Probes the app until nobody wants to know any more.
fn follow_app(shared: &Arc<Shared>, advertised: SocketAddr) -> watch::Receiver<bool> {
    let port = advertised.port();
    let probe = shared.config.app.probe.clone();
    let (tell, told) = watch::channel(probe.kind == ProbeKind::None);
    let (dialer, reclaimer) = (shared.app_dialer.clone(), shared.reclaimer.clone());
    let mut health = Health::new(probe.rise, probe.fall, probe.interval);
    if probe.kind == ProbeKind::None {
        // Held, so that it stays what it is.
        tokio::spawn(async move { tell.closed().await });
        return told;
    }
    let addresses = app_addresses(advertised.ip(), port);
    shared.tasks.spawn("probe of the app", async move {
        while !tell.is_closed() {
            let answered = answers(&dialer, &reclaimer, &addresses, &probe.kind).await;
            health.observe(answered.is_ok());
            let is_well = health.is_well();
            let changed = tell.send_if_modified(|known| std::mem::replace(known, is_well) != is_well);
            match answered {
                Err(error) if changed => tracing::warn!("the app on port {port} is down: {error:#}"),
                Ok(()) if changed => tracing::info!("the app on port {port} answers"),
                _ => {}
            }
            tokio::select! {
                () = sleep(health.pause()) => {}
                () = tell.closed() => {}
            }
        }
    });
    told
}

/// One probe: at the first of its addresses that takes the connection.
async fn answers(
    dialer: &Dialer,
    reclaimer: &Reclaimer,
    addresses: &[SocketAddr],
    kind: &ProbeKind,
) -> Result<()> {
    let probing = async {
        let mut last = None;
        for address in addresses {
            match dialer.dial(*address, reclaimer).await {
                Ok(stream) => match kind {
                    ProbeKind::Http(path) => return get(stream, path).await,
                    ProbeKind::Tcp | ProbeKind::None => return Ok(()),
                },
                Err(error) => drop(last.get_or_insert(error)),
            }
        }
        match last {
            Some(error) => Err(error).context("it cannot be connected"),
            None => bail!("it has no address"),
        }
    };
    timeout(PROBE_TIMEOUT, probing).await.context("it does not answer in time")?
}

async fn get(stream: tokio::net::TcpStream, path: &str) -> Result<()> {
    let request = Request::get(path)
        .header(HOST, "localhost")
        .header("user-agent", "weft-sidecar")
        .body(Empty::<Bytes>::new())?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let mut asking = std::pin::pin!(sender.send_request(request));
    // The connection is driven until the head of the answer is there; its body does not matter. It may end with the
    // answer, or without one.
    let answer = tokio::select! {
        answer = &mut asking => answer,
        ended = connection => {
            ended?;
            asking.await
        }
    };
    let status = answer.context("it closes the connection without an answer")?.status();
    if status.as_u16() >= 400 {
        bail!("it answers {path} with {status}");
    }
    Ok(())
}
