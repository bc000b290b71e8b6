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
mod loss;
mod policies;
mod register;
mod token;
mod watch;

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use serde::Serialize;
use tokio::{
    sync::{mpsc, watch as channel},
    task::JoinSet,
    time::{Instant, sleep_until},
};

use self::{
    error::{Error, Kind},
    watch::{News, Watch},
};
use super::{
    Directory,
    registry::{Asked, Interest},
};
use crate::model::{Registered, Service, ServiceName};

pub use self::{
    client::Client,
    examine::{Examined, examine},
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
    random: fastrand::Rng,
    /// Of the last watch that began.
    number: u64,
}

struct Watched {
    number: u64,
    service: Option<Arc<Service>>,
    /// What is wrong with it, as it was last told.
    mistakes: Vec<String>,
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
                Some(_) = self.tasks.join_next() => false,
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
        self.number += 1;
        let (client, tell) = (self.client.clone(), self.tell.clone());
        let watch = Watch::new(self.number, client, interest, tell, self.random.fork());
        self.tasks.spawn(watch.run());
        // What was known when an earlier watch ended is with whoever still calls it.
        self.watched.insert(name, Watched { number: self.number, service: None, mistakes: Vec::new() });
        false
    }

    fn take(&mut self, news: News) -> bool {
        match news {
            News::Read { service, mistakes } => {
                if let Some(outage) = self.outage.take() {
                    tracing::info!("Consul at {} answers again; it was: {outage}", self.client.shown());
                }
                let Some(watched) = self.watched.get_mut(&service.name) else { return false };
                log_new(&mut watched.mistakes, mistakes);
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
            log_new(&mut watched.mistakes, vec![error.text]);
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

/// Says in the log which mistakes are new.
fn log_new(known: &mut Vec<String>, now: Vec<String>) {
    let before: HashSet<&String> = known.iter().collect();
    for mistake in now.iter().filter(|mistake| !before.contains(mistake)) {
        tracing::warn!("registry: {mistake}; what was last read without mistakes stays in use");
    }
    *known = now;
}
