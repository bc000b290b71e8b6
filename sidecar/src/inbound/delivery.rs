//! Where traffic from outside may go on this host, and whether it must be secured.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use tokio::{net::TcpStream, sync::watch};

use super::AppAddress;
use crate::{
    detect::{Heard, ReadAhead},
    discovery::policies::Policies,
    model::{Failed, Failure, MutualTls, Protocol, Result, ServiceName},
    net,
};

/// The rules of delivery to the app.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// Where a connection was meant to go.
    pub meaning: Meaning,
    /// This workload's own addresses.
    pub addresses: Vec<IpAddr>,
    /// The sidecar's own ports: never a destination.
    pub own_ports: Vec<u16>,
    /// Destinations on ports that the workload registers: delivered to the app's loopback too.
    pub registered: Arc<BTreeMap<SocketAddr, AppAddress>>,
    /// What the app speaks, where the settings declare it.
    pub protocol: Option<Protocol>,
    /// Is plaintext taken, by the settings?
    pub mutual_tls: MutualTls,
    /// The same for single ports; these win over the policy.
    pub mutual_tls_ports: BTreeMap<u16, MutualTls>,
    /// This workload's service.
    pub service: ServiceName,
    /// Its policy wins over the settings of the workload as a whole.
    pub policies: watch::Receiver<Arc<Policies>>,
}

/// How a connection says where it was meant to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meaning {
    /// By the original destination of a redirect (a pod).
    Redirected,
    /// By the listener it came to: the sidecar stands at the advertised address (`exec`).
    Listener,
}

impl Delivery {
    /// The destination that the client dialled.
    pub(super) fn meant(&self, tcp: &TcpStream) -> Result<SocketAddr> {
        let local = tcp.local_addr().map_err(|error| Failed::new(Failure::ClientGone, error.to_string()))?;
        match self.meaning {
            Meaning::Listener => Ok(local),
            // A connection that nobody redirected was meant for the listener itself.
            Meaning::Redirected => Ok(net::original_destination(tcp, local.is_ipv6()).unwrap_or(local)),
        }
    }

    /// Is it an address of this workload?
    pub fn is_own(&self, address: IpAddr) -> bool {
        self.addresses.contains(&address.to_canonical())
    }

    /// Where the app is reached for that destination.
    ///
    /// # Errors
    /// `loop` for a port of ours, `not_ours` for an address or loopback port that nobody outside may reach.
    pub fn address_of_app(&self, meant: SocketAddr) -> Result<AppAddress> {
        let address = meant.ip().to_canonical();
        if self.own_ports.contains(&meant.port()) {
            return Err(Failed::new(Failure::Loop, format!("{meant} is a port of the sidecar itself")));
        }
        if let Some(app) = self.registered.get(&SocketAddr::new(address, meant.port())) {
            return Ok(app.clone());
        }
        if !self.is_own(address) || address.is_loopback() {
            return Err(Failed::new(Failure::NotOurs, format!("{meant} is no address of this workload")));
        }
        match self.meaning {
            Meaning::Redirected => Ok(AppAddress::only(SocketAddr::new(address, meant.port()))),
            Meaning::Listener => {
                Err(Failed::new(Failure::NotOurs, format!("port {} is not registered", meant.port())))
            }
        }
    }

    /// What the app speaks, where declared.
    pub(super) fn protocol(&self) -> Option<Protocol> {
        self.policies.borrow().get(&self.service).and_then(|policy| policy.protocol).or(self.protocol)
    }

    /// The mode of a port now.
    pub fn mutual_tls(&self, port: u16) -> MutualTls {
        let by_policy = || self.policies.borrow().get(&self.service).and_then(|policy| policy.mutual_tls);
        self.mutual_tls_ports.get(&port).copied().or_else(by_policy).unwrap_or(self.mutual_tls)
    }

    /// Resolves when plaintext is no longer taken on this port.
    pub(super) async fn turned_strict(&self, port: u16) {
        let mut policies = self.policies.clone();
        while self.mutual_tls(port) != MutualTls::Strict {
            if policies.changed().await.is_err() {
                // Nobody changes it any more: the process is ending.
                return std::future::pending().await;
            }
        }
    }

    /// Refuses what is not mutual TLS of the mesh where only that is taken.
    pub(super) fn check_plaintext(&self, meant: SocketAddr, ahead: &ReadAhead) -> Result<()> {
        if self.mutual_tls(meant.port()) == MutualTls::Permissive {
            return Ok(());
        }
        let what = match ahead.heard {
            Heard::Protocol(Protocol::Tls) => "TLS that is not the mesh's",
            Heard::Protocol(_) | Heard::End => "plaintext",
            Heard::Silence => "nothing",
        };
        let detail = format!(
            "{meant} takes mutual TLS of the mesh only; the client, which has no identity, sent {what}"
        );
        Err(Failed::new(Failure::PlaintextRefused, detail))
    }
}
