//! The services that the app calls: for each a handle that outlives snapshots, with what is known of it now and
//! the state that must survive an update (load, breakers, retry budget).

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use arc_swap::ArcSwap;
use tokio::{sync::watch, time::Instant};

use crate::{
    balance::{Balancer, Picked},
    connect::Security,
    discovery::{Directory, policies::Policies},
    model::{Failed, Failure, Policy, Protocol, Result, Service, ServiceName},
    policy::budget::Bucket,
    telemetry::{Direction, ServiceMetrics, Telemetry},
};

/// One service that the app calls.
pub struct Upstream {
    name: ServiceName,
    known: ArcSwap<Known>,
    /// Load and breakers of its endpoints.
    pub balancer: Balancer,
    budget: Mutex<Bucket>,
    /// Resolved metrics.
    pub metrics: Arc<ServiceMetrics>,
}

/// What is known of a service now; never changed.
pub struct Known {
    /// From discovery.
    pub service: Arc<Service>,
    /// From the policy store.
    pub policy: Arc<Policy>,
    /// How its endpoints are called.
    pub security: Security,
}

impl Known {
    fn new(service: Arc<Service>, policy: Arc<Policy>) -> Self {
        let expected = if policy.identities.is_empty() { &service.identities } else { &policy.identities };
        let security =
            if expected.is_empty() { Security::Plain } else { Security::Mesh(expected[..].into()) };
        Known { service, policy, security }
    }

    /// What its endpoints speak, where somebody declared it: the policy wins.
    pub fn protocol(&self) -> Option<Protocol> {
        self.policy.protocol.or(self.service.protocol)
    }
}

impl Upstream {
    /// The service's name.
    pub fn name(&self) -> &ServiceName {
        &self.name
    }

    /// What is known now. Taken once per request.
    pub fn known(&self) -> Arc<Known> {
        self.known.load_full()
    }

    /// How much of its traffic may be retries.
    pub fn budget(&self) -> MutexGuard<'_, Bucket> {
        lock(&self.budget)
    }

    /// An endpoint for the next attempt: the one that the app dialled, or the best that was not tried.
    ///
    /// # Errors
    /// `no_endpoint`.
    pub fn pick(&self, only: Option<SocketAddr>, tried: &[SocketAddr], now: Instant) -> Result<Picked> {
        match only {
            Some(address) => self.balancer.pick_only(address, now),
            None => self.balancer.pick(tried, now),
        }
        .ok_or_else(|| Failed::new(Failure::NoEndpoint, format!("`{}` has no endpoint", self.name)))
    }

    fn update(&self, service: Arc<Service>, policy: Arc<Policy>) {
        let known = self.known();
        if Arc::ptr_eq(&known.service, &service) && Arc::ptr_eq(&known.policy, &policy) {
            return;
        }
        self.balancer.set_policy(policy.breaker.clone());
        self.balancer.update(&service.endpoints);
        self.known.store(Arc::new(Known::new(service, policy)));
    }
}

/// The services that the app calls, shared by all workers.
pub struct Upstreams {
    by_name: Mutex<HashMap<ServiceName, Arc<Upstream>>>,
    directory: watch::Receiver<Arc<Directory>>,
    policies: watch::Receiver<Arc<Policies>>,
    /// What stands for a service without a policy.
    default_policy: Arc<Policy>,
    telemetry: Arc<Telemetry>,
}

impl Upstreams {
    /// An empty table that follows these two.
    pub fn new(
        directory: watch::Receiver<Arc<Directory>>,
        policies: watch::Receiver<Arc<Policies>>,
        default_policy: Policy,
        telemetry: Arc<Telemetry>,
    ) -> Arc<Self> {
        let default_policy = Arc::new(default_policy);
        Arc::new(Upstreams { by_name: Mutex::default(), directory, policies, default_policy, telemetry })
    }

    /// The handle of a service; made at the first call.
    pub fn get(&self, service: &Arc<Service>) -> Arc<Upstream> {
        let mut by_name = lock(&self.by_name);
        if let Some(upstream) = by_name.get(&service.name) {
            return upstream.clone();
        }
        let policy = self.policy(&service.name);
        let balancer = Balancer::new(policy.breaker.clone(), fastrand::u64(..));
        balancer.update(&service.endpoints);
        let upstream = Arc::new(Upstream {
            name: service.name.clone(),
            balancer,
            budget: Mutex::new(Bucket::new(&policy.retries.budget, Instant::now())),
            metrics: self.telemetry.metrics().service(Direction::Outbound, service.name.as_str(), ""),
            known: ArcSwap::from_pointee(Known::new(service.clone(), policy)),
        });
        by_name.insert(service.name.clone(), upstream.clone());
        upstream
    }

    /// All handles, for the admin interface.
    pub fn all(&self) -> Vec<Arc<Upstream>> {
        lock(&self.by_name).values().cloned().collect()
    }

    /// Keeps every handle in step with discovery and policy. Ends with their senders.
    pub async fn follow(self: Arc<Self>) {
        let (mut directory, mut policies) = (self.directory.clone(), self.policies.clone());
        loop {
            let changed = tokio::select! {
                changed = directory.changed() => changed,
                changed = policies.changed() => changed,
            };
            if changed.is_err() {
                return;
            }
            let services = directory.borrow_and_update().clone();
            policies.borrow_and_update();
            for upstream in self.all() {
                let gone = || {
                    // The name is kept without endpoints: its callers get a clear answer until it is back.
                    let known = upstream.known();
                    Arc::new(Service { endpoints: Vec::new(), ..(*known.service).clone() })
                };
                let service = services.service(upstream.name()).cloned().unwrap_or_else(gone);
                upstream.update(service, self.policy(upstream.name()));
            }
        }
    }

    fn policy(&self, name: &ServiceName) -> Arc<Policy> {
        self.policies.borrow().get(name).unwrap_or(&self.default_policy).clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
