//! A source that must be asked by name. Whoever meets a name (the first connection to it, a question over DNS)
//! asks here, and waits for the directory to say something about it; whoever goes on using it touches its
//! [`Interest`], which keeps the watch alive. Which registry stands behind is not known here. Bounded: names that
//! nobody registered, and names at all.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU8, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};

use super::Directory;
use crate::model::{Service, ServiceName};

/// Names that a sidecar has an interest in: as many as can have a virtual address.
const MAX_NAMES: usize = 65_536;
/// Names at a time that nobody registered.
pub(super) const MAX_UNREGISTERED: usize = 1024;
/// How long the first connection to a name waits for what the registry says.
const PATIENCE: Duration = Duration::from_secs(3);

/// Where names are asked for. One for all workers.
#[derive(Debug)]
pub struct Registry {
    names: Mutex<HashMap<ServiceName, Weak<Interest>>>,
    /// None: there is no registry, and the directory is all there is.
    asked: Option<mpsc::UnboundedSender<Arc<Interest>>>,
    unregistered: Arc<AtomicUsize>,
    directory: watch::Receiver<Arc<Directory>>,
}

/// What the registry's source works on: the names that are asked for.
#[derive(Debug)]
pub struct Asked {
    pub(super) names: mpsc::UnboundedReceiver<Arc<Interest>>,
    /// How many of the names nobody registered, as the source knows.
    pub(super) unregistered: Arc<AtomicUsize>,
}

/// That somebody here wants to know about a service.
#[derive(Debug)]
pub struct Interest {
    name: ServiceName,
    state: AtomicU8,
    /// Holds each interest once at most, so it is as bounded as their table.
    asked: mpsc::UnboundedSender<Arc<Interest>>,
}

/// Nobody watches the service.
const IDLE: u8 = 0;
/// It is watched, and was not used since the watch last looked.
const QUIET: u8 = 1;
/// It is watched, and was used since.
const USED: u8 = 2;

impl Registry {
    /// No registry: what is not in the directory does not exist.
    pub fn none(directory: watch::Receiver<Arc<Directory>>) -> Self {
        Registry { names: Mutex::default(), asked: None, unregistered: Arc::default(), directory }
    }

    /// A registry whose source takes the names that are asked for, and publishes into this directory.
    pub fn new(directory: watch::Receiver<Arc<Directory>>) -> (Self, Asked) {
        let (asked, names) = mpsc::unbounded_channel();
        let unregistered = Arc::<AtomicUsize>::default();
        let source = Asked { names, unregistered: unregistered.clone() };
        (Registry { names: Mutex::default(), asked: Some(asked), unregistered, directory }, source)
    }

    /// Is there one?
    pub fn is_there(&self) -> bool {
        self.asked.is_some()
    }

    /// The interest in a name; the same for all who have it. None where there is no registry, or too many names
    /// are asked for.
    pub fn interest(&self, name: &ServiceName) -> Option<Arc<Interest>> {
        let asked = self.asked.as_ref()?;
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = names.get(name).and_then(Weak::upgrade) {
            return Some(known);
        }
        if names.len() >= MAX_NAMES {
            names.retain(|_, known| known.strong_count() > 0);
        }
        let is_full =
            names.len() >= MAX_NAMES || self.unregistered.load(Ordering::Relaxed) >= MAX_UNREGISTERED;
        if is_full {
            tracing::debug!(%name, "too many names are asked for; this one is not");
            return None;
        }
        let (state, asked) = (AtomicU8::new(IDLE), asked.clone());
        let interest = Arc::new(Interest { name: name.clone(), state, asked });
        names.insert(name.clone(), Arc::downgrade(&interest));
        Some(interest)
    }

    /// What is known of a service; asks for it where nothing is, and waits for what the registry says. None where
    /// it says nothing in time, and where there is no registry.
    pub async fn ask(&self, name: &ServiceName) -> Option<Arc<Service>> {
        let known = self.directory.borrow().service(name).cloned();
        if let Some(interest) = self.interest(name) {
            interest.touch();
        } else if known.is_none() {
            return None;
        }
        if known.is_some() {
            return known;
        }
        let mut directory = self.directory.clone();
        let said = timeout(PATIENCE, directory.wait_for(|now| now.service(name).is_some())).await;
        said.ok()?.ok()?.service(name).cloned()
    }
}

impl Interest {
    /// The service.
    pub fn name(&self) -> &ServiceName {
        &self.name
    }

    /// Says that the service is used now. Cheap while it is watched; begins a watch where there is none.
    pub fn touch(self: &Arc<Self>) {
        if self.state.load(Ordering::Relaxed) != USED && self.state.swap(USED, Ordering::AcqRel) == IDLE {
            // Without a source nothing is watched, and nothing changes any more.
            let _ = self.asked.send(self.clone());
        }
    }

    /// Is it watched?
    pub fn is_watched(&self) -> bool {
        self.state.load(Ordering::Relaxed) != IDLE
    }

    /// Was it used since the last call?
    pub(super) fn was_used(&self) -> bool {
        self.state.compare_exchange(USED, QUIET, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Ends the watch, unless it was used meanwhile.
    pub(super) fn retire(&self) -> bool {
        self.state.compare_exchange(QUIET, IDLE, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> ServiceName {
        text.parse().unwrap()
    }

    #[tokio::test]
    async fn a_name_is_asked_for_once_while_it_is_watched() {
        let (_sender, directory) = watch::channel(Arc::default());
        let (registry, mut asked) = Registry::new(directory);
        let interest = registry.interest(&name("orders")).unwrap();
        assert!(Arc::ptr_eq(&interest, &registry.interest(&name("orders")).unwrap()));
        assert!(!interest.is_watched());
        interest.touch();
        interest.touch();
        assert_eq!(asked.names.recv().await.unwrap().name().as_str(), "orders");
        assert!(asked.names.try_recv().is_err());
        assert!(!interest.retire(), "it is in use");
        assert!(interest.was_used() && !interest.was_used());
        interest.touch();
        assert!(interest.was_used());
        assert!(interest.retire());
        assert!(asked.names.try_recv().is_err());
        interest.touch();
        assert!(asked.names.try_recv().is_ok(), "watched again");
    }

    #[tokio::test(start_paused = true)]
    async fn who_asks_waits_for_the_directory_and_not_for_ever() {
        let (sender, directory) = watch::channel(Arc::<Directory>::default());
        let (registry, _asked) = Registry::new(directory.clone());
        assert_eq!(registry.ask(&name("orders")).await, None);
        let orders = name("orders");
        let (found, ()) = tokio::join!(registry.ask(&orders), async {
            tokio::time::sleep(PATIENCE / 2).await;
            sender.send_replace(Arc::new(Directory::new(vec![Service::named(name("orders"))])));
        });
        assert_eq!(found.unwrap().name.as_str(), "orders");
        let none = Registry::none(directory);
        assert!(none.interest(&name("orders")).is_none());
        assert!(none.ask(&name("orders")).await.is_some(), "it is in the directory");
        assert!(none.ask(&name("cart")).await.is_none());
    }

    #[tokio::test]
    async fn names_are_bounded() {
        let (_sender, directory) = watch::channel(Arc::default());
        let (registry, asked) = Registry::new(directory);
        let held: Vec<_> =
            (0..MAX_NAMES).filter_map(|at| registry.interest(&name(&format!("s{at}")))).collect();
        assert_eq!(held.len(), MAX_NAMES);
        assert!(registry.interest(&name("one-more")).is_none());
        drop(held);
        assert!(registry.interest(&name("one-more")).is_some());
        asked.unregistered.store(MAX_UNREGISTERED, Ordering::Relaxed);
        assert!(registry.interest(&name("another")).is_none());
    }
}
