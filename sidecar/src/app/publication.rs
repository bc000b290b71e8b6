//! Our own workload, made known to others: a file in the services directory, a registration in Consul, or both;
//! and the probe of the app that the registration tells of.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, bail};
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
    policy::health::Health,
};

/// For one probe of the app.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

/// Where others can find our workload.
#[derive(Default)]
pub(super) struct Publication {
    file: Option<Published>,
    consul: Option<OwnRegistration>,
}

impl Publication {
    /// Makes the workload known wherever the settings say. Nothing where it has no port.
    pub(super) fn of(shared: &Arc<Shared>, advertised: IpAddr) -> Result<Publication> {
        let config = &shared.config;
        let Some(port) = config.app.ports.first().copied().filter(|_| config.stores.publish) else {
            return Ok(Publication::default());
        };
        let identities = shared.credentials.borrow().iter().map(|own| own.id().clone()).collect();
        let endpoint = Endpoint {
            zone: config.own.zone.as_deref().map(Into::into),
            version: config.app.version.as_deref().map(Into::into),
            tags: config.app.tags.iter().map(|tag| tag.as_str().into()).collect(),
            weight: config.app.weight.unwrap_or(DEFAULT_WEIGHT),
            ..Endpoint::at((advertised, port).into())
        };
        let workload = Workload {
            service: config.own.service.clone(),
            instance: config.own.instance.clone(),
            protocol: config.app.protocol,
            identities,
            endpoint,
        };
        let file = config.stores.services.as_ref().map(|folder| {
            publish::publish(folder, &workload)
                .with_context(|| format!("cannot publish this workload in {}", folder.display()))
        });
        let consul = shared.consul.clone().zip(config.stores.consul.as_ref()).map(|(client, settings)| {
            let registration = Registration {
                workload,
                weight: config.app.weight,
                ttl: settings.ttl,
                deregister_after: settings.deregister_after,
            };
            let health = follow_app(shared, advertised, port);
            consul::register(client, registration, health, fastrand::Rng::new())
        });
        Ok(Publication { file: file.transpose()?, consul })
    }

    /// Takes the workload back everywhere.
    pub(super) async fn withdraw(self) {
        if let Some(registered) = self.consul {
            registered.withdraw().await;
        }
        if let Some(file) = self.file
            && let Err(error) = file.withdraw().await
        {
            tracing::warn!("this workload cannot be taken back: {error}");
        }
    }
}

/// Probes the app until nobody wants to know any more.
fn follow_app(shared: &Arc<Shared>, advertised: IpAddr, port: u16) -> watch::Receiver<bool> {
    let probe = shared.config.app.probe.clone();
    let (tell, told) = watch::channel(probe.kind == ProbeKind::None);
    let dialer = shared.app_dialer.clone();
    let mut health = Health::new(probe.rise, probe.fall, probe.interval);
    if probe.kind == ProbeKind::None {
        // Held, so that it stays what it is.
        tokio::spawn(async move { tell.closed().await });
        return told;
    }
    let addresses = [Ipv4Addr::LOCALHOST.into(), advertised, Ipv6Addr::LOCALHOST.into()]
        .map(|ip| SocketAddr::new(ip, port));
    shared.tasks.spawn("probe of the app", async move {
        while !tell.is_closed() {
            let answered = answers(&dialer, &addresses, &probe.kind).await;
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
async fn answers(dialer: &Dialer, addresses: &[SocketAddr], kind: &ProbeKind) -> Result<()> {
    let probing = async {
        let mut last = None;
        for address in addresses {
            match dialer.dial(*address).await {
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
