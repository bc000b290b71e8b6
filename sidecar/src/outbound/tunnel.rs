//! Bytes that are not HTTP: a connection of their own to an endpoint, or to an address outside the mesh.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::{sync::watch, time::Instant};

use super::{Known, Outbound, Target};
use crate::{
    balance::Picked,
    connect::{Security, trust_ended, trust_is_over},
    model::{Failed, Failure, Result},
    net::{self, Stream},
    policy::response::failure_speaks_against_endpoint,
    telemetry::Connection,
    tls::{Alpn, Credentials, VerifiedPeer},
};

/// Longest wait for an address outside the mesh.
const OUTSIDE_TIMEOUT: Duration = Duration::from_secs(10);
/// Endpoints to try before the client is told.
const MOST_ATTEMPTS: usize = 3;

/// An open connection to a server, for one client.
pub(super) struct Tunnel {
    stream: Stream,
    peer: Option<VerifiedPeer>,
    credentials: watch::Receiver<Option<Arc<Credentials>>>,
    /// Counts as load of the endpoint while the tunnel is open.
    _picked: Option<Picked>,
}

impl Outbound {
    /// Passes a connection to an address outside the mesh through untouched.
    pub(super) async fn pass_through(
        &self,
        stream: Stream,
        address: SocketAddr,
        record: &mut Connection,
    ) -> Result<()> {
        let server = self.connector.connect(address, &Security::Plain, Alpn::Tcp, OUTSIDE_TIMEOUT).await;
        match server {
            Ok(secured) => {
                let (copied, ended) = net::copy_both_ways(stream, secured.stream).await;
                record.bytes(copied.forth, copied.back);
                ended.map_err(|error| Failed::new(Failure::Reset, error.to_string()))
            }
            Err(failed) => {
                // As the app would have seen it.
                net::reset(&stream);
                Err(failed)
            }
        }
    }

    /// Connects to an endpoint of the target. Nothing is processed before the connection stands, so another
    /// endpoint may be tried.
    pub(super) async fn open_tunnel(&self, target: &Target, record: &mut Connection) -> Result<Tunnel> {
        let (upstream, only) = match target {
            Target::Service(upstream) => (upstream, None),
            Target::Endpoint(upstream, endpoint) => (upstream, Some(endpoint.address)),
            Target::Outside(address) => {
                let secured =
                    self.connector.connect(*address, &Security::Plain, Alpn::Tcp, OUTSIDE_TIMEOUT).await?;
                return Ok(self.tunnel(secured.stream, None, None));
            }
        };
        let known = upstream.known();
        let mut tried = Vec::new();
        loop {
            let mut picked = upstream.pick(only, &tried, Instant::now())?;
            let address = picked.address();
            record.endpoint(address);
            match self.connect(address, &known).await {
                Ok((stream, peer)) => {
                    picked.succeeded(Instant::now());
                    if let Some(peer) = &peer {
                        record.peer(Some(peer.id()));
                    }
                    return Ok(self.tunnel(stream, peer, Some(picked)));
                }
                Err(failed) => {
                    if failure_speaks_against_endpoint(failed.failure) {
                        picked.failed(Instant::now());
                    }
                    tried.push(address);
                    if only.is_some() || tried.len() >= MOST_ATTEMPTS || !failed.failure.nothing_processed() {
                        return Err(failed);
                    }
                    tracing::debug!(%failed, "another endpoint is tried");
                }
            }
        }
    }

    async fn connect(&self, address: SocketAddr, known: &Known) -> Result<(Stream, Option<VerifiedPeer>)> {
        if let Some(arrival) = self.own_arrival(address) {
            return Ok((self.inbound.connect_own(&arrival).await?, None));
        }
        let limit = known.policy.timeouts.connect;
        let secured = self.connector.connect(address, &known.security, Alpn::Tcp, limit).await?;
        Ok((secured.stream, secured.peer))
    }

    pub(super) fn tunnel(
        &self,
        stream: Stream,
        peer: Option<VerifiedPeer>,
        picked: Option<Picked>,
    ) -> Tunnel {
        Tunnel { stream, peer, credentials: self.connector.credentials().clone(), _picked: picked }
    }
}

impl Tunnel {
    /// The server's side.
    pub(super) fn stream(&mut self) -> &mut Stream {
        &mut self.stream
    }

    /// Copies both ways until both sides have ended, or the trust in the peer has.
    pub(super) async fn copy(self, client: Stream, record: &mut Connection) -> Result<()> {
        let Tunnel { stream, peer, credentials, _picked } = self;
        let trust = async {
            match &peer {
                Some(peer) => {
                    trust_ended(peer, credentials, Duration::ZERO).await;
                    trust_is_over(peer)
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            (copied, ended) = net::copy_both_ways(client, stream) => {
                record.bytes(copied.forth, copied.back);
                ended.map_err(|error| Failed::new(Failure::Reset, error.to_string()))
            }
            over = trust => Err(over),
        }
    }
}
