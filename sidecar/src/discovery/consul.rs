//! Consul as the registry: the services that this sidecar asks for are watched, each by a task of its own, and
//! published with those of the files in one directory. Nothing that is known is dropped because Consul is away;
//! a file counts before Consul. Registration and policies stand beside this, over the same client.

mod agent;
pub mod answers;
mod backoff;
mod client;
mod error;
mod examine;
#[cfg(test)]
mod fake;
mod health;
mod known;
mod lines;
mod loss;
#[cfg(test)]
mod newer;
mod policies;
mod register;
mod token;
mod watch;

use std::{
    collections::HashMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use serde::Serialize;
use tokio::{
    sync::{mpsc, watch as channel},
    task::{self, JoinError, JoinSet},
    time::{Instant, sleep, sleep_until},
};

use self::{
    error::{Error, Kind},
    lines::Lines,
    watch::{News, Watch},
};
use super::{
    Directory,
    registry::{Asked, Interest},
};
use crate::model::{Registered, Service, ServiceName};

pub use self::{
    client::Client,
    examine::{Examined, Instances, examine},
    policies::{PolicySettings, follow_policies},
    register::{OwnRegistration, Registration, register},
};

/// Changes come in bursts: they are published together after this long.
const BURST: Duration = Duration::from_millis(10);
/// News that wait to be taken over.
const MOST_NEWS: usize = 256;

/// How the registry is doing, for the admin interface.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Status {
    /// The agent that answered last.
    pub agent: String,
    /// Why nothing can be asked now; none: all is well.
    pub error: Option<String>,
    /// Services that are watched.
    pub watched: usize,
    /// Names that are asked for and that nobody registered.
    pub unregistered: usize,
    /// What is wrong with single services; bounded.
    pub mistakes: Vec<String>,
}

/// A watch that ended with a panic begins anew after this long: what it met may be there still.
const AFTER_PANIC: Duration = Duration::from_secs(10);
/// Mistakes shown in a status.
const MAX_SHOWN: usize = 50;

/// What the watches have found, and where it goes.
struct Source {
    client: Arc<Client>,
    files: channel::Receiver<Arc<Directory>>,
    asked: Asked,
    directory: channel::Sender<Arc<Directory>>,
    status: channel::Sender<Status>,
    watched: HashMap<ServiceName, Watched>,
    /// Names that a file has: watched if it should go.
    covered: HashMap<ServiceName, Arc<Interest>>,
    tasks: JoinSet<()>,
    tell: mpsc::Sender<News>,
    outage: Option<String>,
    lines: Lines,
    random: fastrand::Rng,
    /// Of the last watch that began.
    number: u64,
}

struct Watched {
    number: u64,
    interest: Arc<Interest>,
    task: task::Id,
    service: Option<Arc<Service>>,
    /// What is wrong with it, as it was last told.
    mistakes: Vec<String>,
    /// Instances that cannot be read.
    unreadable: usize,
}

/// Watches what is asked for, and publishes it together with the services of the files. Ends when nobody listens
/// for the directory any more.
pub async fn run(
    client: Arc<Client>,
    files: channel::Receiver<Arc<Directory>>,
    asked: Asked,
    directory: channel::Sender<Arc<Directory>>,
    status: channel::Sender<Status>,
    mut random: fastrand::Rng,
) {
    let looking = (client.clone(), random.fork());
    let (tell, news) = mpsc::channel(MOST_NEWS);
    let source = Source {
        client,
        files,
        asked,
        directory,
        status,
        watched: HashMap::new(),
        covered: HashMap::new(),
        tasks: JoinSet::new(),
        tell,
        outage: None,
        lines: Lines::default(),
        random,
        number: 0,
    };
    tokio::select! {
        () = source.run(news) => {}
        () = loss::look(&looking.0, looking.1) => {}
    }
}

impl Source {
    async fn run(mut self, mut news: mpsc::Receiver<News>) {
        // Published at once: a sidecar that knows nothing yet can still be asked.
        let mut publish_at = Some(Instant::now());
        let mut has_files = true;
        loop {
            let publishing = async {
                match publish_at {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let has_changed = tokio::select! {
                Some(interest) = self.asked.names.recv() => self.begin(interest),
                Some(news) = news.recv() => self.take(news),
                changed = self.files.changed(), if has_files => {
                    has_files = changed.is_ok();
                    self.files_changed()
                }
                Some(ended) = self.tasks.join_next_with_id() => self.ended(ended),
                () = publishing => {
                    publish_at = None;
                    self.publish();
                    false
                }
                () = self.directory.closed() => return,
            };
            if has_changed && publish_at.is_none() {
                publish_at = Some(Instant::now() + BURST);
            }
        }
    }

    /// Somebody asks for a service.
    fn begin(&mut self, interest: Arc<Interest>) -> bool {
        let name = interest.name().clone();
        if self.files.borrow().service(&name).is_some() {
            self.covered.insert(name, interest);
            return false;
        }
        // What was known when an earlier watch ended is with whoever still calls it.
        self.watch(interest, None);
        false
    }

    /// Begins a watch; `known` is what was known of the service by another one.
    fn watch(&mut self, interest: Arc<Interest>, known: Option<Watched>) {
        self.number += 1;
        let (client, tell) = (self.client.clone(), self.tell.clone());
        let watch = Watch::new(self.number, client, interest.clone(), tell, self.random.fork());
        let rest = if known.is_some() { AFTER_PANIC } else { Duration::ZERO };
        let running = async move {
            sleep(rest).await;
            watch.run().await;
        };
        let task = self.tasks.spawn(running).id();
        let (service, mistakes, unreadable) = match known {
            Some(known) => (known.service, known.mistakes, known.unreadable),
            None => (None, Vec::new(), 0),
        };
        let name = interest.name().clone();
        let number = self.number;
        self.watched.insert(name, Watched { number, interest, task, service, mistakes, unreadable });
    }

    /// A task of a watch has ended; one that panicked is replaced, and what it knew stays.
    fn ended(&mut self, ended: Result<(task::Id, ()), JoinError>) -> bool {
        let Err(error) = ended else { return false };
        let dead = self.watched.values().find(|watched| watched.task == error.id());
        let Some(name) = dead.map(|watched| watched.interest.name().clone()) else { return false };
        tracing::error!(
            "the watch of service `{name}` ended with a panic, a bug of ours; what is known stays in use, and it \
             begins anew in {AFTER_PANIC:?}"
        );
        if let Some(known) = self.watched.remove(&name) {
            self.watch(known.interest.clone(), Some(known));
        }
        false
    }

    fn take(&mut self, news: News) -> bool {
        match news {
            News::Read { service, mistakes, unreadable } => {
                if let Some(outage) = self.outage.take() {
                    tracing::info!("Consul at {} answers again; it was: {outage}", self.client.shown());
                }
                let Some(watched) = self.watched.get_mut(&service.name) else { return false };
                self.lines.tell_new(&mut watched.mistakes, mistakes);
                watched.unreadable = unreadable;
                let has_changed = watched.service.as_deref() != Some(&service);
                if has_changed {
                    watched.service = Some(Arc::new(service));
                }
                // The status may have changed where the service has not.
                true
            }
            News::Failed { name, error } => self.failed(&name, error),
            News::Ended { name, number } => {
                // It may have been asked for again meanwhile.
                let is_over = self.watched.get(&name).is_some_and(|watched| watched.number == number);
                is_over && self.watched.remove(&name).is_some()
            }
        }
    }

    fn failed(&mut self, name: &ServiceName, error: Error) -> bool {
        // The agent is well, and this was told once for all services.
        if error.kind == Kind::WentBack {
            return false;
        }
        if error.kind.is_of_the_agent() {
            if self.outage.is_none() {
                tracing::warn!("{error}; what is known stays in use");
            }
            self.outage = Some(error.text.clone());
        }
        let Some(watched) = self.watched.get_mut(name) else { return false };
        if !error.kind.is_of_the_agent() {
            self.lines.tell_new(&mut watched.mistakes, vec![error.text]);
        }
        if watched.service.is_none() {
            let unknown = Service { registered: Registered::Unknown, ..Service::named(name.clone()) };
            watched.service = Some(Arc::new(unknown));
        }
        true
    }

    /// A name that a file has now is no longer watched; one that no file has any more is, if it is used.
    fn files_changed(&mut self) -> bool {
        let files = self.files.borrow_and_update().clone();
        let gone: Vec<ServiceName> =
            self.covered.keys().filter(|name| files.service(name).is_none()).cloned().collect();
        for name in gone {
            if let Some(interest) = self.covered.remove(&name) {
                self.begin(interest);
            }
        }
        true
    }

    fn publish(&mut self) {
        let files = self.files.borrow().clone();
        let ours = self.watched.values().filter_map(|watched| watched.service.clone());
        let newer = Directory::merged(&files, ours);
        // Also where nothing changed: the first publication says that there was a look.
        if !self.directory.borrow().same_as(&newer) || newer.services().len() == 0 {
            self.directory.send_replace(Arc::new(newer));
        }
        let unreadable = self.watched.values().map(|watched| watched.unreadable).sum();
        self.client.metrics.registry_unreadable(unreadable);
        let status = self.status();
        self.asked.unregistered.store(status.unregistered, Ordering::Relaxed);
        self.status.send_if_modified(|known| {
            let changed = *known != status;
            *known = status;
            changed
        });
        self.covered.retain(|_, interest| Arc::strong_count(interest) > 1);
    }

    fn status(&self) -> Status {
        let unregistered = self.watched.values().filter(|watched| {
            watched.service.as_ref().is_some_and(|service| service.registered != Registered::Yes)
        });
        let mistakes = self.watched.values().flat_map(|watched| watched.mistakes.iter().cloned());
        let mut mistakes: Vec<String> = mistakes.take(MAX_SHOWN).collect();
        mistakes.sort();
        Status {
            agent: self.client.shown(),
            error: self.outage.clone(),
            watched: self.watched.len(),
            unregistered: unregistered.count(),
            mistakes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_watch_that_panics_is_begun_anew_and_what_it_knew_stays() {
        let (client, _) = fake::client(|_| Some((7, "[]"))).await;
        let (directory, published) = channel::channel(Arc::default());
        let (registry, asked) = super::super::Registry::new(published);
        let (tell, _news) = mpsc::channel(MOST_NEWS);
        let mut source = Source {
            client,
            files: channel::channel(Arc::default()).1,
            asked,
            directory,
            status: channel::channel(Status::default()).0,
            watched: HashMap::new(),
            covered: HashMap::new(),
            tasks: JoinSet::new(),
            tell,
            outage: None,
            lines: Lines::default(),
            random: fastrand::Rng::with_seed(1),
            number: 0,
        };
        let name: ServiceName = "orders".parse().unwrap();
        let interest = registry.interest(&name).unwrap();
        source.begin(interest);
        // In place of the watch a task that panics.
        let bug = source.tasks.spawn(async { panic!("a bug, for this test") }).id();
        let known = Some(Arc::new(Service::named(name.clone())));
        let watched = source.watched.get_mut(&name).unwrap();
        (watched.task, watched.service) = (bug, known.clone());
        while source.watched[&name].task == bug {
            let ended = source.tasks.join_next_with_id().await.unwrap();
            source.ended(ended);
        }
        assert_eq!(source.watched[&name].service, known);
        assert_eq!(source.watched[&name].number, 2);
    }
}
