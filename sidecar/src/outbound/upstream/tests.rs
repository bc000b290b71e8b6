//! The first call of a service.

use futures_util::future::join_all;

use super::*;
use crate::{
    config::AccessLogMode,
    model::Endpoint,
    telemetry::{AccessLog, AccessLogTarget, Metrics, TraceSettings},
};

fn service(endpoints: usize) -> Arc<Service> {
    let address = |number: usize| SocketAddr::from(([10, 0, (number / 250) as u8, (number % 250) as u8], 80));
    Arc::new(Service {
        endpoints: (0..endpoints).map(|number| Endpoint::at(address(number))).collect(),
        ..Service::named("orders".parse().unwrap())
    })
}

#[test]
fn a_service_whose_identity_cannot_be_read_is_not_called_in_plaintext() {
    let known = |is_identity_unreadable, policy| {
        let service = Service { is_identity_unreadable, ..(*service(1)).clone() };
        Known::new(Arc::new(service), Arc::new(policy)).security
    };
    assert!(matches!(known(false, Policy::default()), Security::Plain));
    assert!(matches!(known(true, Policy::default()), Security::Forbidden));
    let identities = vec!["spiffe://d/ns/default/sa/orders".parse().unwrap()];
    let named = Policy { identities, ..Policy::default() };
    assert!(matches!(known(true, named), Security::Mesh(_)));
}

/// Follows a directory in which the service is.
fn upstreams(service: &Arc<Service>) -> Arc<Upstreams> {
    following(watch::channel(Arc::new(Directory::new(vec![(**service).clone()]))).1)
}

fn following(directory: watch::Receiver<Arc<Directory>>) -> Arc<Upstreams> {
    let registry = Registry::none(directory.clone());
    asking(registry, directory)
}

fn asking(registry: Registry, directory: watch::Receiver<Arc<Directory>>) -> Arc<Upstreams> {
    let metrics = Arc::new(Metrics::new());
    let log = AccessLog::open(AccessLogMode::Off, &AccessLogTarget::Stdout, &metrics).unwrap();
    let (telemetry, _) = Telemetry::new(&TraceSettings::read(|_| None, "test").0, log, metrics);
    let policies = watch::channel(Arc::new(Policies::default())).1;
    Upstreams::new(directory, policies, Arc::new(registry), Policy::default(), telemetry)
}

#[tokio::test]
async fn of_many_first_calls_one_makes_the_handle() {
    let service = service(MANY);
    let upstreams = upstreams(&service);
    let handles = join_all((0..20).map(|_| upstreams.get(service.clone()))).await;
    assert!(handles.iter().all(|handle| Arc::ptr_eq(handle, &handles[0])));
    assert_eq!(handles[0].balancer.states(Instant::now()).len(), MANY);
}

#[tokio::test]
async fn a_handle_that_was_made_of_something_old_is_brought_up_to_date() {
    for (old, now) in [(1, 2), (MANY, MANY + 1)] {
        let newer = service(now);
        let handle = upstreams(&newer).get(service(old)).await;
        assert_eq!(handle.known().service.endpoints.len(), now);
        assert_eq!(handle.balancer.states(Instant::now()).len(), now);
    }
}

#[tokio::test]
async fn who_asked_anew_does_not_call_with_what_was_known_before() {
    for (old, now) in [(1, 2), (MANY, MANY + 1)] {
        let (tell, directory) = watch::channel(Arc::new(Directory::new(vec![(*service(old)).clone()])));
        let upstreams = following(directory);
        let handle = upstreams.get(service(old)).await;
        let newer = service(now);
        let last = newer.endpoints[now - 1].address;
        assert_eq!(upstreams.service_with(last), None);
        tell.send_replace(Arc::new(Directory::new(vec![(*newer).clone()])));
        assert_eq!(handle.known().service.endpoints.len(), old, "nobody has followed yet");
        let asked = upstreams.get_as(newer).await;
        assert!(Arc::ptr_eq(&asked, &handle));
        assert_eq!(asked.known().service.endpoints.len(), now);
        assert_eq!(upstreams.service_with(last).as_ref(), Some(asked.name()));
    }
}

#[tokio::test]
async fn a_name_that_is_forgotten_leaves_the_metrics_and_others_stay() {
    let (_sender, directory) = watch::channel(Arc::<Directory>::default());
    let (registry, _asked) = Registry::new(directory.clone());
    let upstreams = asking(registry, directory);
    let misspelt = Arc::new(Service::named("oders".parse().unwrap()));
    let in_use = upstreams.get(Arc::new(Service::named("cart".parse().unwrap()))).await;
    drop((upstreams.get(misspelt).await, upstreams.get(service(1)).await));
    let metrics = upstreams.telemetry.metrics();
    for name in ["oders", "orders", "cart"] {
        Condition::ALL.iter().for_each(|condition| metrics.endpoints(name, condition.label(), 0));
    }
    upstreams.forget(&Directory::default());
    let text = metrics.expose(false);
    assert!(!text.contains("weft_endpoints{service=\"oders\""), "{text}");
    for name in ["orders", "cart"] {
        for state in ["ready", "ejected", "probing"] {
            let line = format!("weft_endpoints{{service=\"{name}\",state=\"{state}\"}} 0");
            assert!(text.contains(&line), "{line} is not in\n{text}");
        }
    }
    drop(in_use);
    upstreams.forget(&Directory::default());
    assert!(!metrics.expose(false).contains("weft_endpoints{service=\"cart\""));
}
