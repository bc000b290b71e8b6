//! The document that tells where a service runs (docs/services.md): read into the words of the model, with every
//! mistake named. Pure; several documents may speak of one service, and putting them together is not done here.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use crate::{
    config::document::{EXPECTED_IDENTITY, EXPECTED_NAME, Item, Mistake, Mistakes, Section, parse},
    discovery::is_virtual,
    model::{DEFAULT_WEIGHT, Endpoint, Protocol, ServiceName},
};
use weft_proto::spiffe::SpiffeId;

/// Endpoints of one document, and of all together.
pub(super) const MAX_ENDPOINTS: usize = 20_000;
/// Identities, and service addresses, of one document.
const MAX_LISTED: usize = 1_000;
const MAX_WEIGHT: u64 = 10_000;
/// The longest lease; a publisher touches its document several times in it.
const MAX_LEASE: Duration = Duration::from_secs(3600);

/// What one document says.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ServiceDocument {
    pub(super) service: ServiceName,
    pub(super) protocol: Option<(Protocol, u64)>,
    pub(super) identities: Vec<SpiffeId>,
    pub(super) addresses: Vec<SocketAddr>,
    pub(super) endpoints: Vec<Endpoint>,
    /// The document counts only so long after it was last touched.
    pub(super) lease: Option<Duration>,
}

/// Reads a document. None, or a value not to be used, where there are mistakes.
pub(super) fn read(text: &str, mistakes: &mut Mistakes) -> Option<ServiceDocument> {
    let mut root = parse(text, mistakes)?;
    let service = root.need("service", mistakes).and_then(|item| item.parsed(EXPECTED_NAME, mistakes));
    let protocol = root.take("protocol").and_then(|item| Some((item.protocol(mistakes)?, item.line())));
    let identities = members(&mut root, "identities", MAX_LISTED, mistakes, |item, mistakes| {
        item.parsed(EXPECTED_IDENTITY, mistakes)
    });
    let addresses =
        members(&mut root, "addresses", MAX_LISTED, mistakes, |item, mistakes| dialable(&item, mistakes));
    let endpoints = members(&mut root, "endpoints", MAX_ENDPOINTS, mistakes, endpoint);
    let lease =
        root.take("lease").and_then(|item| item.duration(Duration::from_secs(1)..=MAX_LEASE, mistakes));
    root.finish(mistakes);
    Some(ServiceDocument { service: service?, protocol, identities, addresses, endpoints, lease })
}

/// What is wrong with the text of a service document; empty if it can be used.
pub fn mistakes_in(text: &str) -> Vec<Mistake> {
    let mut mistakes = Mistakes::new(Path::new("service document"));
    let read = read(text, &mut mistakes);
    match mistakes.or_else(()) {
        Ok(()) => {
            debug_assert!(read.is_some(), "nothing was read, and nobody said why");
            Vec::new()
        }
        Err(found) => found,
    }
}

fn members<T>(
    root: &mut Section,
    key: &'static str,
    most: usize,
    mistakes: &mut Mistakes,
    read: impl Fn(Item, &mut Mistakes) -> Option<T>,
) -> Vec<T> {
    let items = root.take(key).map(|item| item.list(most, mistakes)).unwrap_or_default();
    items.into_iter().filter_map(|item| read(item, mistakes)).collect()
}

fn endpoint(item: Item, mistakes: &mut Mistakes) -> Option<Endpoint> {
    let mut entry = item.section(mistakes)?;
    let address = entry.need("address", mistakes).and_then(|item| dialable(&item, mistakes));
    let weight = match entry.take("weight") {
        Some(item) => item.number(1..=MAX_WEIGHT, mistakes).and_then(|weight| u16::try_from(weight).ok()),
        None => Some(DEFAULT_WEIGHT),
    };
    let zone = entry.take("zone").and_then(|item| zone(&item, mistakes));
    entry.finish(mistakes);
    Some(Endpoint { weight: weight?, zone, ..Endpoint::at(address?) })
}

/// An address that a connection can go to, and that is not one of those we hand out ourselves.
fn dialable(item: &Item, mistakes: &mut Mistakes) -> Option<SocketAddr> {
    const EXPECTED: &str = "an address and port to dial, for example 10.1.0.2:8080 or [fd00::2]:8080";
    let address: SocketAddr = item.parsed(EXPECTED, mistakes)?;
    let ip = address.ip().to_canonical();
    if address.port() == 0 || ip.is_unspecified() || ip.is_multicast() || is_virtual(ip) {
        item.refuse(EXPECTED, mistakes);
        return None;
    }
    Some(SocketAddr::new(ip, address.port()))
}

fn zone(item: &Item, mistakes: &mut Mistakes) -> Option<Arc<str>> {
    const EXPECTED: &str = "a zone of at most 63 of a-z A-Z 0-9 . _ -";
    let zone: String = item.parsed(EXPECTED, mistakes)?;
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if !(1..=63).contains(&zone.len()) || !zone.bytes().all(allowed) {
        item.refuse(EXPECTED, mistakes);
        return None;
    }
    Some(zone.into())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn read_it(text: &str) -> Result<ServiceDocument, Vec<String>> {
        let mut mistakes = Mistakes::new(Path::new("orders.yaml"));
        let document = read(text, &mut mistakes);
        match mistakes.or_else(document) {
            Ok(document) => Ok(document.unwrap()),
            Err(mistakes) => Err(mistakes.iter().map(ToString::to_string).collect()),
        }
    }

    #[test]
    fn a_document_becomes_words_of_the_model() {
        let document = read_it(
            "service: orders_shop
protocol: grpc
identities: [spiffe://weft.local/ns/shop/sa/orders]
addresses: ['10.0.0.1:80']
endpoints:
  - {address: 10.1.0.2:8080, weight: 50, zone: eu-1a}
  - address: '[fd00::2]:8080'
lease: 30s
",
        )
        .unwrap();
        assert_eq!(document.service.as_str(), "orders_shop");
        assert_eq!(document.protocol, Some((Protocol::Http2, 2)));
        assert_eq!(document.identities[0].as_str(), "spiffe://weft.local/ns/shop/sa/orders");
        assert_eq!(document.addresses, ["10.0.0.1:80".parse().unwrap()]);
        assert_eq!(document.endpoints[0].weight, 50);
        assert_eq!(document.endpoints[0].zone.as_deref(), Some("eu-1a"));
        assert_eq!(document.endpoints[1], Endpoint::at("[fd00::2]:8080".parse().unwrap()));
        assert_eq!(document.lease, Some(Duration::from_secs(30)));
        assert_eq!(read_it("service: a").unwrap().endpoints, []);
    }

    #[test]
    fn the_documented_example_is_read() {
        let docs = include_str!("../../../docs/services.md");
        let (_, rest) = docs.split_once("```yaml\n").expect("an example in docs/services.md");
        let document = read_it(rest.split_once("```").unwrap().0).unwrap();
        assert_eq!((document.service.as_str(), document.endpoints.len()), ("orders_shop", 2));
    }

    #[test]
    fn every_mistake_has_its_line() {
        let text = "service: Orders
protocol: http
identities: [https://orders]
addresses: [0.0.0.0:80]
endpoints:
  - address: 10.1.0.2
  - address: 10.1.0.2:0
  - address: 240.0.0.7:80
  - address: 224.0.0.1:80
  - {address: 10.1.0.2:80, weight: 0}
  - {address: 10.1.0.2:80, weigth: 3}
  - {address: 10.1.0.2:80, zone: 'a b'}
  - {weight: 3}
lease: 30
";
        let found = read_it(text).unwrap_err();
        let lines: Vec<&str> = found.iter().filter_map(|text| text.split(':').nth(1)).collect();
        assert_eq!(
            lines,
            ["1", "2", "3", "4", "6", "7", "8", "9", "10", "11", "12", "13", "14"],
            "{found:#?}"
        );
        assert_eq!(found[1], "orders.yaml:2: `protocol` is \"http\"; expected http1, http2, grpc, tls, tcp");
        assert_eq!(
            found[8],
            "orders.yaml:10: `endpoints[4].weight` is 0; expected a whole number from 1 to 10000"
        );
        assert_eq!(read_it("{}").unwrap_err(), ["orders.yaml:1: `service` is missing"]);
    }
}
