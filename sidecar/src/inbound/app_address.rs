//! Where the app listens. A destination does not say it: an app may listen on all addresses, on the loopback of one
//! family only, or on the pod's own address only. The first that takes the connection is remembered for that destination
//! until it refuses one, so that a call costs one connect, as if it were known.

use std::{
    collections::BTreeMap,
    fmt::Write,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use crate::model::{Failed, Failure, Result};

/// The addresses of the app for one destination. Cheap to clone; what one clone learns the others know.
#[derive(Debug, Clone)]
pub struct AppAddress(Arc<Candidates>);

#[derive(Debug)]
struct Candidates {
    /// In the order in which they are tried; never empty.
    addresses: Vec<SocketAddr>,
    /// Which of them took the last connection.
    last: AtomicUsize,
}

impl AppAddress {
    /// Every destination that is delivered to a registered port: these addresses of the workload, these ports.
    pub fn registered(addresses: &[IpAddr], ports: &[u16]) -> Arc<BTreeMap<SocketAddr, AppAddress>> {
        let each = addresses.iter().flat_map(|ip| ports.iter().map(|port| SocketAddr::new(*ip, *port)));
        Arc::new(each.map(|meant| (meant, AppAddress::anywhere(meant))).collect())
    }

    /// On the loopback of the destination's family, where an app sees a caller that it trusts; at the destination itself;
    /// on the other loopback.
    fn anywhere(meant: SocketAddr) -> Self {
        let mut loopback = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
        if meant.is_ipv6() {
            loopback.reverse();
        }
        let [near, other] = loopback.map(|ip| SocketAddr::new(ip, meant.port()));
        let mut addresses = vec![near];
        addresses.extend([meant, other].into_iter().filter(|address| *address != near));
        AppAddress(Arc::new(Candidates { addresses, last: AtomicUsize::new(0) }))
    }

    /// At the destination itself and nowhere else.
    pub(super) fn only(meant: SocketAddr) -> Self {
        AppAddress(Arc::new(Candidates { addresses: vec![meant], last: AtomicUsize::new(0) }))
    }

    /// Where the app was reached last, or is looked for first.
    pub fn now(&self) -> SocketAddr {
        self.0.addresses[self.0.last.load(Ordering::Relaxed)]
    }

    /// Has `connect` try one address after the other, until something is there that takes the connection.
    ///
    /// # Errors
    /// Those of `connect`; where nothing listens anywhere, what was said at the first.
    pub(super) async fn reach<T, Connecting>(&self, connect: impl Fn(SocketAddr) -> Connecting) -> Result<T>
    where
        Connecting: Future<Output = Result<T>>,
    {
        let Candidates { addresses, last } = &*self.0;
        let known = last.load(Ordering::Relaxed);
        let others = (0..addresses.len()).filter(|index| *index != known);
        let mut nowhere: Option<Failed> = None;
        for index in std::iter::once(known).chain(others) {
            match connect(addresses[index]).await {
                Err(failed) if nobody_listens(failed.failure) => match &mut nowhere {
                    None => nowhere = Some(failed),
                    // It cannot fail on a String.
                    Some(first) => drop(write!(first.detail, "; nor does it listen at {}", addresses[index])),
                },
                reached => {
                    if reached.is_ok() && index != known {
                        last.store(index, Ordering::Relaxed);
                    }
                    return reached;
                }
            }
        }
        last.store(0, Ordering::Relaxed);
        Err(nowhere.unwrap_or_else(|| Failed::new(Failure::Internal, "an app without an address")))
    }
}

/// Another address may be the one. Not after a time limit: something is there, and has no room.
fn nobody_listens(failure: Failure) -> bool {
    matches!(failure, Failure::ConnectRefused | Failure::ConnectUnreachable)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use futures_util::FutureExt;

    use super::*;

    /// What was dialled on the way to an app that listens there, and what came of it.
    fn dials(app: &AppAddress, listening: &[&str], refusal: Failure) -> (Vec<String>, Result<String>) {
        let dialled = Mutex::new(Vec::new());
        let connect = |address: SocketAddr| {
            dialled.lock().unwrap().push(address.to_string());
            let listens = listening.contains(&&*address.to_string());
            async move {
                let failed = || Failed::new(refusal, format!("{address}: no"));
                if listens { Ok(address.to_string()) } else { Err(failed()) }
            }
        };
        let outcome = app.reach(connect).now_or_never().unwrap();
        (dialled.into_inner().unwrap(), outcome)
    }

    fn app(meant: &str) -> AppAddress {
        let meant: SocketAddr = meant.parse().unwrap();
        AppAddress::registered(&[meant.ip()], &[meant.port()])[&meant].clone()
    }

    #[test]
    fn each_address_is_tried_in_its_order() {
        for (meant, order) in [
            ("10.0.0.1:80", &["127.0.0.1:80", "10.0.0.1:80", "[::1]:80"][..]),
            ("[fd00::1]:80", &["[::1]:80", "[fd00::1]:80", "127.0.0.1:80"]),
            ("127.0.0.1:80", &["127.0.0.1:80", "[::1]:80"]),
            ("[::1]:80", &["[::1]:80", "127.0.0.1:80"]),
        ] {
            for (index, address) in order.iter().enumerate() {
                let (dialled, reached) = dials(&app(meant), &[address], Failure::ConnectRefused);
                assert_eq!(dialled, order[..=index]);
                assert_eq!(reached.unwrap(), *address);
            }
            let (dialled, failed) = dials(&app(meant), &[], Failure::ConnectUnreachable);
            assert_eq!(dialled, order);
            let failed = failed.unwrap_err();
            assert_eq!(failed.failure, Failure::ConnectUnreachable);
            assert!(order.iter().all(|address| failed.detail.contains(address)), "{failed}");
        }
    }

    #[test]
    fn what_worked_is_tried_first_until_it_works_no_longer() {
        let app = app("10.0.0.1:80");
        let copy = app.clone();
        dials(&app, &["[::1]:80"], Failure::ConnectRefused).1.unwrap();
        let (dialled, _) = dials(&copy, &["[::1]:80"], Failure::ConnectRefused);
        assert_eq!(dialled, ["[::1]:80"], "one connect, and another clone knows it");
        let (dialled, _) = dials(&app, &["10.0.0.1:80"], Failure::ConnectRefused);
        assert_eq!(dialled, ["[::1]:80", "127.0.0.1:80", "10.0.0.1:80"]);
        assert_eq!(app.now(), "10.0.0.1:80".parse().unwrap());
        dials(&app, &[], Failure::ConnectRefused).1.unwrap_err();
        assert_eq!(
            app.now(),
            "127.0.0.1:80".parse().unwrap(),
            "nothing is remembered of an app that is gone"
        );
    }

    #[test]
    fn an_app_without_room_is_not_looked_for_elsewhere() {
        for failure in [Failure::ConnectTimeout, Failure::Overloaded, Failure::Reset] {
            let (dialled, failed) = dials(&app("10.0.0.1:80"), &["[::1]:80"], failure);
            assert_eq!((dialled.len(), failed.unwrap_err().failure), (1, failure));
        }
    }
}
