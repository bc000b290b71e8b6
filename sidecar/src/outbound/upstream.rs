//! The services that the app calls: for each a handle that outlives snapshots, with what is known of it now and
//! the state that must survive an update (load, breakers, retry budget).

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use arc_swap::ArcSwap;
use tokio::{sync::watch, task::spawn_blocking, time::Instant};

use crate::{
    balance::{Balancer, Condition, Picked},
    connect::Security,
    discovery::{Directory, Interest, Registry, policies::Policies},
    model::{
        Endpoint, Failed, Failure, MutualTls, Policy, Protocol, Registered, Result, Service, ServiceName,
    },
    policy::budget::Bucket,
    telemetry::{Direction, ServiceMetrics, Telemetry},
};

/// The handle of a service with so many endpoints is made beside the workers: room for 10,000 takes a millisecond, and
/// several where the machine has to find the memory first.
const MANY: usize = 1_000;

/// One service that the app calls.
pub struct Upstream {
    name: ServiceName,
    known: ArcSwap<Known>,
    /// Held while it is put in step with discovery.
    following: Mutex<()>,
    /// Keeps the registry's watch alive while the service is called; none without a registry.
    interest: Option<Arc<Interest>>,
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
        let security = match (expected.is_empty(), policy.outbound_mutual_tls) {
            (false, _) => Security::Mesh(expected[..].into()),
            (true, _) if service.is_identity_unreadable => Security::Forbidden,
            (true, MutualTls::Permissive) => Security::Plain,
            (true, MutualTls::Strict) => Security::Forbidden,
        };
        Known { service, policy, security }
    }

    /// Do its endpoints have sidecars, which prove who they are?
    pub fn is_mesh(&self) -> bool {
        matches!(self.security, Security::Mesh(_))
    }

    /// The endpoint at this address.
    pub fn endpoint(&self, address: SocketAddr) -> Option<&Endpoint> {
        let endpoints = &self.service.endpoints;
        let at = endpoints.binary_search_by_key(&address, |endpoint| endpoint.address).ok()?;
        endpoints.get(at)
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
    /// `no_endpoint`, `not_registered`, `registry_unavailable`.
    pub fn pick(&self, only: Option<SocketAddr>, tried: &[SocketAddr], now: Instant) -> Result<Picked> {
        if let Some(interest) = &self.interest {
            interest.touch();
        }
        match only {
            Some(address) => self.balancer.pick_only(address, now),
            None => self.balancer.pick(tried, now),
        }
        .ok_or_else(|| self.nobody())
    }

    fn nobody(&self) -> Failed {
        let name = &self.name;
        match self.known().service.registered {
            Registered::Yes => Failed::new(Failure::NoEndpoint, format!("`{name}` has no endpoint")),
            Registered::No => {
                let detail = format!("nobody registered `{name}`; is it spelt right, and does it run?");
                Failed::new(Failure::NotRegistered, detail)
            }
            Registered::Unknown => {
                let detail = format!("the registry cannot be asked for `{name}`, and nothing is known of it");
                Failed::new(Failure::RegistryUnavailable, detail)
            }
        }
    }

    /// Takes over what discovery says now; nothing where it says nothing, as long as a registry may know more.
    fn follow(&self, found: Option<&Arc<Service>>, policy: Arc<Policy>) {
        let known = self.known();
        let service = match found {
            // The registry is away: what is known stays in use.
            Some(service)
                if service.registered == Registered::Unknown && !known.service.endpoints.is_empty() =>
            {
                known.service.clone()
            }
            Some(service) => service.clone(),
            None if self.interest.is_some() => known.service.clone(),
            // The name is kept without endpoints: its callers get a clear answer until it is back.
            None => Arc::new(Service { endpoints: Vec::new(), ..(*known.service).clone() }),
        };
        self.update(service, policy);
    }

    fn update(&self, service: Arc<Service>, policy: Arc<Policy>) {
        let known = self.known();
        if Arc::ptr_eq(&known.service, &service) && Arc::ptr_eq(&known.policy, &policy) {
            return;
        }
        self.balancer.set_policy(policy.breaker.clone());
        self.balancer.update(service.clone());
        self.known.store(Arc::new(Known::new(service, policy)));
    }
}

/// The services that the app calls, shared by all workers.
pub struct Upstreams {
    by_name: Mutex<HashMap<ServiceName, Arc<Upstream>>>,
    /// Held while the handle of a service with many endpoints is made.
    adding: tokio::sync::Mutex<()>,
    directory: watch::Receiver<Arc<Directory>>,
    policies: watch::Receiver<Arc<Policies>>,
    registry: Arc<Registry>,
    /// What stands for a service without a policy.
    default_policy: Arc<Policy>,
    telemetry: Arc<Telemetry>,
}

impl Upstreams {
    /// An empty table that follows these two.
    pub fn new(
        directory: watch::Receiver<Arc<Directory>>,
        policies: watch::Receiver<Arc<Policies>>,
        registry: Arc<Registry>,
        default_policy: Policy,
        telemetry: Arc<Telemetry>,
    ) -> Arc<Self> {
        let default_policy = Arc::new(default_policy);
        Arc::new(Upstreams {
            by_name: Mutex::default(),
            adding: tokio::sync::Mutex::default(),
            directory,
            policies,
            registry,
            default_policy,
            telemetry,
        })
    }

    /// The handle of a service; made at the first call.
    pub async fn get(self: &Arc<Self>, service: Arc<Service>) -> Arc<Upstream> {
        let called_before = lock(&self.by_name).get(&service.name).cloned();
        match called_before {
            Some(upstream) => upstream,
            None if service.endpoints.len() < MANY => self.add(&service),
            None => Box::pin(self.add_beside(service)).await,
        }
    }

    /// The handle of a service whose watch has just begun anew, in step with what came: who asked may be quicker than who
    /// keeps all handles in step.
    pub async fn get_as(self: &Arc<Self>, service: Arc<Service>) -> Arc<Upstream> {
        let many = service.endpoints.len() >= MANY;
        let upstream = self.get(service.clone()).await;
        if Arc::ptr_eq(&upstream.known().service, &service) {
            return upstream;
        }
        if many {
            let (upstreams, behind) = (self.clone(), upstream.clone());
            // A panic there leaves what is known.
            let _ = spawn_blocking(move || upstreams.refresh(&behind)).await;
        } else {
            self.refresh(&upstream);
        }
        upstream
    }

    /// The name of the service, called before, that has this endpoint as far as is known.
    pub fn service_with(&self, endpoint: SocketAddr) -> Option<ServiceName> {
        let endpoint = SocketAddr::new(endpoint.ip().to_canonical(), endpoint.port());
        let has = |upstream: &Arc<Upstream>| upstream.known().endpoint(endpoint).is_some();
        lock(&self.by_name).values().find(|upstream| has(upstream)).map(|upstream| upstream.name.clone())
    }

    /// One at a time: of those who wait for the same service the first one makes its handle for all.
    async fn add_beside(self: &Arc<Self>, service: Arc<Service>) -> Arc<Upstream> {
        let _alone = self.adding.lock().await;
        let made_meanwhile = lock(&self.by_name).get(&service.name).cloned();
        if let Some(upstream) = made_meanwhile {
            return upstream;
        }
        let (upstreams, added) = (self.clone(), service.clone());
        let added = spawn_blocking(move || upstreams.add(&added)).await;
        added.unwrap_or_else(|_panicked| self.add(&service))
    }

    fn add(&self, service: &Arc<Service>) -> Arc<Upstream> {
        let policy = self.policy(&service.name);
        let balancer = Balancer::new(policy.breaker.clone(), fastrand::u64(..));
        balancer.update(service.clone());
        let upstream = Arc::new(Upstream {
            name: service.name.clone(),
            balancer,
            budget: Mutex::new(Bucket::new(&policy.retries.budget, Instant::now())),
            metrics: self.telemetry.metrics().service(Direction::Outbound, service.name.as_str(), ""),
            known: ArcSwap::from_pointee(Known::new(service.clone(), policy)),
            following: Mutex::default(),
            interest: self.registry.interest(&service.name),
        });
        // Of two first calls at a time the second one takes what the first one made.
        let upstream =
            lock(&self.by_name).entry(service.name.clone()).or_insert_with(|| upstream.clone()).clone();
        // Something newer may have come before it was in the table.
        self.refresh(&upstream);
        upstream
    }

    /// Puts a handle in step with what discovery and policy say now. Who comes last sees what is newest.
    fn refresh(&self, upstream: &Upstream) {
        let _alone = lock(&upstream.following);
        let found = self.directory.borrow().service(upstream.name()).cloned();
        upstream.follow(found.as_ref(), self.policy(upstream.name()));
    }

    /// The handle of a service that was called before and of which something is known, though nobody watches it
    /// now.
    pub fn called_before(&self, name: &ServiceName) -> Option<Arc<Upstream>> {
        lock(&self.by_name)
            .get(name)
            .filter(|upstream| !upstream.known().service.endpoints.is_empty())
            .cloned()
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
                self.refresh(&upstream);
            }
            self.forget(&services);
        }
    }

    /// Drops the handles of names that nobody registered, once nobody asks for them, and what the metrics say of their
    /// endpoints: a name that was once misspelt would stand there for ever.
    fn forget(&self, services: &Directory) {
        lock(&self.by_name).retain(|name, upstream| {
            let is_kept = upstream.interest.is_none()
                || services.service(name).is_some()
                || Arc::strong_count(upstream) > 1
                || !upstream.known().service.endpoints.is_empty();
            if !is_kept {
                let states = Condition::ALL.map(Condition::label);
                self.telemetry.metrics().forget_endpoints(name.as_str(), &states);
            }
            is_kept
        });
    }

    fn policy(&self, name: &ServiceName) -> Arc<Policy> {
        self.policies.borrow().get(name).unwrap_or(&self.default_policy).clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
