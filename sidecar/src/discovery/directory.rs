//! The directory: one immutable snapshot of all known services, by name, by service address and by endpoint
//! address. It answers what a destination means. A newer snapshot shares the services that did not change, so
//! that comparing pointers tells what did. It does not know where its content comes from.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::{VirtualAddresses, is_virtual};
use crate::model::{Endpoint, Service, ServiceName};

/// All known services at one moment.
#[derive(Debug, Default)]
pub struct Directory {
    by_name: BTreeMap<ServiceName, Arc<Service>>,
    by_address: HashMap<SocketAddr, Arc<Service>>,
    /// The service, and which of its endpoints.
    by_endpoint: HashMap<SocketAddr, (Arc<Service>, usize)>,
}

/// What an app meant by the address it dialled.
#[derive(Debug, Clone, PartialEq)]
pub enum Destination {
    /// A service: any of its endpoints will do.
    Service(Arc<Service>),
    /// This endpoint of the service and no other.
    Endpoint(Arc<Service>, Endpoint),
    /// A virtual address of a service that the directory has not: a registry may know it.
    Unasked(ServiceName),
    /// A virtual address that stands for no service now: never to be passed through.
    UnknownVirtual(IpAddr),
    /// Nothing the directory knows.
    Unknown,
}

impl Directory {
    /// A directory of these services. Of two with one name the later counts; an address that two services claim
    /// belongs to the one whose name sorts first, so that every sidecar decides the same.
    pub fn new(services: Vec<Service>) -> Self {
        Directory::default().updated(services)
    }

    /// A newer directory. Services that are equal to ours keep their `Arc`.
    pub fn updated(&self, services: Vec<Service>) -> Self {
        let share = |service: Service| match self.by_name.get(&service.name) {
            Some(known) if **known == service => Arc::clone(known),
            _ => Arc::new(service),
        };
        Directory::of(services.into_iter().map(|service| (service.name.clone(), share(service))).collect())
    }

    /// The services of `first`, and those others whose names it has not.
    pub fn merged(first: &Directory, others: impl Iterator<Item = Arc<Service>>) -> Self {
        let mut by_name: BTreeMap<_, _> = others.map(|service| (service.name.clone(), service)).collect();
        by_name.extend(first.by_name.iter().map(|(name, service)| (name.clone(), Arc::clone(service))));
        Directory::of(by_name)
    }

    fn of(by_name: BTreeMap<ServiceName, Arc<Service>>) -> Self {
        let mut by_address = HashMap::new();
        let mut by_endpoint = HashMap::new();
        for service in by_name.values() {
            for address in &service.addresses {
                by_address.entry(canonical(*address)).or_insert_with(|| Arc::clone(service));
            }
            for (at, endpoint) in service.endpoints.iter().enumerate() {
                by_endpoint.entry(canonical(endpoint.address)).or_insert_with(|| (Arc::clone(service), at));
            }
        }
        Directory { by_name, by_address, by_endpoint }
    }

    /// The service of that name.
    pub fn service(&self, name: &ServiceName) -> Option<&Arc<Service>> {
        self.by_name.get(name)
    }

    /// All services, sorted by name.
    pub fn services(&self) -> impl ExactSizeIterator<Item = &Arc<Service>> {
        self.by_name.values()
    }

    /// What a destination means: a virtual address, else a service address, else an endpoint. A virtual address
    /// means its service on every port.
    pub fn lookup(&self, destination: SocketAddr, virtuals: &VirtualAddresses) -> Destination {
        let destination = canonical(destination);
        if is_virtual(destination.ip()) {
            return match virtuals.name_of(destination.ip()) {
                Some(name) => {
                    self.service(&name).cloned().map_or(Destination::Unasked(name), Destination::Service)
                }
                None => Destination::UnknownVirtual(destination.ip()),
            };
        }
        if let Some(service) = self.by_address.get(&destination) {
            return Destination::Service(Arc::clone(service));
        }
        match self.by_endpoint.get(&destination) {
            Some((service, at)) => Destination::Endpoint(Arc::clone(service), service.endpoints[*at].clone()),
            None => Destination::Unknown,
        }
    }

    /// Do both hold the very same services?
    pub fn same_as(&self, other: &Directory) -> bool {
        self.by_name.len() == other.by_name.len()
            && self
                .by_name
                .values()
                .zip(other.by_name.values())
                .all(|(ours, theirs)| Arc::ptr_eq(ours, theirs))
    }
}

/// An IPv4 address that came through an IPv6 socket is the IPv4 address.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    fn service(name: &str, addresses: &[&str], endpoints: &[&str]) -> Service {
        Service {
            addresses: addresses.iter().map(|text| text.parse().unwrap()).collect(),
            endpoints: endpoints.iter().map(|text| Endpoint::at(text.parse().unwrap())).collect(),
            ..Service::named(name.parse().unwrap())
        }
    }

    #[test]
    fn a_destination_means_what_it_belongs_to() {
        let directory = Directory::new(vec![
            service("orders", &["10.0.0.1:80"], &["10.1.0.1:8080", "10.1.0.2:8080"]),
            service("cart", &["10.0.0.2:80", "[fd00::2]:80"], &["10.1.0.1:8080", "[fd00::9]:1"]),
        ]);
        let virtuals = VirtualAddresses::in_memory();
        let now = SystemTime::UNIX_EPOCH;
        let virtual_orders = virtuals.address_of(&"orders".parse().unwrap(), now).unwrap();
        let virtual_gone = virtuals.address_of(&"gone".parse().unwrap(), now).unwrap();
        let meaning = |text: &str| match directory.lookup(text.parse().unwrap(), &virtuals) {
            Destination::Service(service) => service.name.to_string(),
            Destination::Endpoint(service, endpoint) => format!("{} at {}", service.name, endpoint.address),
            Destination::Unasked(name) => format!("perhaps {name}"),
            Destination::UnknownVirtual(address) => format!("virtual {address}"),
            Destination::Unknown => "unknown".to_owned(),
        };
        for (destination, expected) in [
            ("10.0.0.1:80", "orders"),
            ("10.0.0.1:81", "unknown"),
            ("10.0.0.2:80", "cart"),
            ("[::ffff:10.0.0.2]:80", "cart"),
            ("[fd00::2]:80", "cart"),
            ("10.1.0.2:8080", "orders at 10.1.0.2:8080"),
            ("10.1.0.1:8080", "cart at 10.1.0.1:8080"),
            ("[fd00::9]:1", "cart at [fd00::9]:1"),
            ("10.1.0.2:8081", "unknown"),
            ("127.0.0.1:80", "unknown"),
            ("240.0.0.9:80", "virtual 240.0.0.9"),
            ("[::ffff:240.0.0.9]:80", "virtual 240.0.0.9"),
            (&format!("{virtual_orders}:80"), "orders"),
            (&format!("{virtual_orders}:9999"), "orders"),
            (&format!("{virtual_gone}:80"), "perhaps gone"),
        ] {
            assert_eq!(meaning(destination), expected, "{destination}");
        }
    }

    #[test]
    fn a_service_that_did_not_change_keeps_its_arc() {
        let old =
            Directory::new(vec![service("a", &[], &["10.0.0.1:1"]), service("b", &[], &["10.0.0.2:1"])]);
        let new = old.updated(vec![service("b", &[], &["10.0.0.3:1"]), service("a", &[], &["10.0.0.1:1"])]);
        let arc = |directory: &Directory, name: &str| {
            directory.service(&name.parse().unwrap()).map(Arc::clone).expect("a service")
        };
        assert!(Arc::ptr_eq(&arc(&old, "a"), &arc(&new, "a")));
        assert!(!Arc::ptr_eq(&arc(&old, "b"), &arc(&new, "b")));
        assert!(!old.same_as(&new));
        let again = new.updated(vec![service("a", &[], &["10.0.0.1:1"]), service("b", &[], &["10.0.0.3:1"])]);
        assert!(new.same_as(&again));
        assert!(!new.same_as(&new.updated(Vec::new())));
    }
}
