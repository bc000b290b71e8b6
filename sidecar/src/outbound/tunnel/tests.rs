//! When another endpoint may be tried, and what speaks against one.

use std::{collections::HashMap, time::Duration};

use rustls::AlertDescription;
use tokio::net::{TcpListener, TcpStream};

use super::*;
use crate::{
    discovery::Directory,
    drain::Drain,
    model::{Endpoint, Policy, Service},
    outbound::tests::stories_of,
};

/// Longer than bytes on this host are on the way.
const MOMENT: Duration = Duration::from_millis(50);

fn judged(unopened: Unopened) -> (Failure, bool) {
    match unopened {
        Unopened::Failed { failed, unprocessed } => (failed.failure, unprocessed),
        Unopened::Http => panic!("HTTP"),
    }
}

#[test]
fn who_refuses_our_certificate_has_seen_nothing_of_what_was_passed_on() {
    let address = SocketAddr::from(([10, 0, 0, 1], 80));
    let alert = |alert| io::Error::new(io::ErrorKind::InvalidData, rustls::Error::AlertReceived(alert));
    let of = |error: io::Error, passed_on| judged(not_confirmed(address, &error, passed_on));
    for passed_on in [true, false] {
        let refused = of(alert(AlertDescription::CertificateExpired), passed_on);
        assert_eq!(refused, (Failure::Handshake, true));
        let other = of(alert(AlertDescription::InternalError), passed_on);
        assert_eq!(other, (Failure::Reset, !passed_on));
        let reset = of(io::ErrorKind::ConnectionReset.into(), passed_on);
        assert_eq!(reset, (Failure::Reset, !passed_on));
    }
}

async fn pair() -> (TcpStream, Stream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (near, Stream::from(listener.accept().await.unwrap().0))
}

#[tokio::test]
async fn an_attempt_that_took_too_long_has_shown_the_app_what_was_passed_on_in_it() {
    let address = SocketAddr::from(([10, 0, 0, 1], 80));
    let late = || Failed::new(Failure::AttemptTimeout, "late");
    let (mut app, mut stream) = pair().await;
    let mut client = Waiting::known(&mut stream);
    for (said, unprocessed) in [(&b""[..], true), (b"bytes", false), (b"", true)] {
        app.write_all(said).await.unwrap();
        let (_silent, mut server) = pair().await;
        client.begin_attempt();
        tokio::time::timeout(MOMENT, client.until_taken(&mut server, address)).await.err().unwrap();
        assert_eq!(judged(client.timed_out(late())), (Failure::AttemptTimeout, unprocessed), "{said:?}");
    }
}

#[tokio::test]
async fn an_endpoint_that_resets_instead_of_a_first_byte_has_failed_though_the_client_has_ended() {
    for (answer, failures) in [(&b""[..], 1), (b"answer", 0)] {
        let endpoint = TcpListener::bind("127.0.0.2:0").await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, name) = (listener.local_addr().unwrap(), "orders".parse().unwrap());
        let endpoints = vec![Endpoint::at(endpoint.local_addr().unwrap())];
        let service = Service { endpoints, ..Service::named("orders".parse().unwrap()) };
        let explicit = HashMap::from([(address, name)]);
        let (_, outbound) = stories_of(Directory::new(vec![service]), explicit, Policy::default());
        let (_drain, draining) = Drain::new();
        let mut app = TcpStream::connect(address).await.unwrap();
        let (tcp, client) = listener.accept().await.unwrap();
        let carried = tokio::spawn(outbound.clone().connection(tcp, client, draining));
        app.write_all(b"\0 bytes").await.unwrap();
        app.shutdown().await.unwrap();
        let (mut server, _) = endpoint.accept().await.unwrap();
        server.read_to_end(&mut Vec::new()).await.unwrap();
        server.write_all(answer).await.unwrap();
        if !answer.is_empty() {
            app.read_exact(&mut vec![0; answer.len()]).await.unwrap();
        }
        net::reset(&Stream::from(server));
        app.read_to_end(&mut Vec::new()).await.unwrap_err();
        carried.await.unwrap();
        let upstreams = outbound.upstreams.all();
        assert_eq!(upstreams[0].balancer.states(Instant::now())[0].failures, failures, "{answer:?}");
    }
}
