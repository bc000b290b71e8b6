//! Services from a watched folder of YAML documents (docs/services.md). Several documents may add endpoints to
//! one service. A document with a mistake keeps its last good content and is reported; a document with a lease
//! counts only while its publisher touches it, so that a crashed sidecar leaves no ghost.

use std::{
    collections::BTreeMap,
    mem,
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use tokio::{sync::watch, task::spawn_blocking};

use super::{
    Directory,
    folder::{Folder, Watch, log_new, take_over},
    service_document::{self, MAX_ENDPOINTS, ServiceDocument},
};
use crate::{
    config::document::Mistake,
    model::{Protocol, Service, ServiceName},
};

/// Where the documents are.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The folder with the documents of services.
    pub folder: PathBuf,
}

/// Watches the folder and publishes a directory at the first look and at every change; and with it all mistakes
/// that stand in the documents now. Ends when nobody listens for the directory any more.
pub async fn run(
    settings: Settings,
    directory: watch::Sender<Arc<Directory>>,
    mistakes: watch::Sender<Vec<Mistake>>,
) {
    let mut watch = Watch::new(&settings.folder);
    let mut documents = Documents::new(&settings.folder);
    let mut first = true;
    loop {
        let looked = spawn_blocking(move || {
            let found = documents.look(SystemTime::now());
            (documents, found)
        });
        // The look does not panic; if it did, whoever started us would have to know.
        let Ok((same, (services, found))) = looked.await else {
            panic!("the look at a folder of documents ended with a panic");
        };
        documents = same;
        let newer = directory.borrow().updated(services);
        if mem::take(&mut first) || !directory.borrow().same_as(&newer) {
            directory.send_replace(Arc::new(newer));
        }
        log_new("services", &mistakes.borrow(), &found);
        mistakes.send_if_modified(|known| {
            let changed = *known != found;
            *known = found;
            changed
        });
        tokio::select! {
            () = watch.changed() => {}
            () = directory.closed() => return,
        }
    }
}

/// The documents of the folder as last read without mistakes.
struct Documents {
    folder: Folder,
    good: BTreeMap<PathBuf, ServiceDocument>,
    bad: BTreeMap<PathBuf, Vec<Mistake>>,
}

impl Documents {
    fn new(folder: &Path) -> Self {
        Documents { folder: Folder::new(folder), good: BTreeMap::new(), bad: BTreeMap::new() }
    }

    /// Looks at the folder once: the services now, and every mistake.
    fn look(&mut self, now: SystemTime) -> (Vec<Service>, Vec<Mistake>) {
        let look = self.folder.look();
        let folder_mistake = look.mistake.clone();
        take_over(look, &mut self.good, &mut self.bad, service_document::read);
        let fresh = self.good.iter().filter(|(file, document)| {
            document.lease.is_none_or(|lease| {
                let touched = self.folder.modified(file).unwrap_or(SystemTime::UNIX_EPOCH);
                !now.duration_since(touched).is_ok_and(|age| age > lease)
            })
        });
        let (services, contradictions) = merge(fresh);
        let mistakes = folder_mistake.into_iter().chain(self.bad.values().flatten().cloned());
        (services, mistakes.chain(contradictions).collect())
    }
}

/// Puts the documents together, in the order of their paths: endpoints, addresses and identities add up; of two
/// protocols the first counts.
fn merge<'a>(
    documents: impl Iterator<Item = (&'a PathBuf, &'a ServiceDocument)>,
) -> (Vec<Service>, Vec<Mistake>) {
    let mut services: BTreeMap<&ServiceName, Service> = BTreeMap::new();
    let mut declared: BTreeMap<&ServiceName, (&PathBuf, u64, Protocol)> = BTreeMap::new();
    let (mut endpoints, mut mistakes) = (0, Vec::new());
    for (file, document) in documents {
        let mistake = |line: Option<u64>, text: String| Mistake { file: file.clone(), line, text };
        endpoints += document.endpoints.len();
        if endpoints > MAX_ENDPOINTS {
            endpoints -= document.endpoints.len();
            mistakes.push(mistake(
                None,
                format!("with this file there are more than {MAX_ENDPOINTS} endpoints; it is left out"),
            ));
            continue;
        }
        if let Some((protocol, line)) = document.protocol {
            let (other, at, before) = *declared.entry(&document.service).or_insert((file, line, protocol));
            if before != protocol {
                let text = format!(
                    "`protocol` of {} is {protocol}, but {}:{at} says {before}; expected the same in both",
                    document.service,
                    other.display()
                );
                mistakes.push(mistake(Some(line), text));
            }
        }
        let service =
            services.entry(&document.service).or_insert_with(|| Service::named(document.service.clone()));
        service.protocol = service.protocol.or(document.protocol.map(|(protocol, _)| protocol));
        service.identities.extend_from_slice(&document.identities);
        service.addresses.extend_from_slice(&document.addresses);
        service.endpoints.extend_from_slice(&document.endpoints);
    }
    (services.into_values().map(tidy).collect(), mistakes)
}

/// Sorted and each once, so that the order of files and lines makes no difference. Of two entries for one
/// endpoint the heavier counts.
fn tidy(mut service: Service) -> Service {
    service.identities.sort();
    service.identities.dedup();
    service.addresses.sort();
    service.addresses.dedup();
    service.endpoints.sort_by_key(|endpoint| (endpoint.address, u16::MAX - endpoint.weight));
    service.endpoints.dedup_by_key(|endpoint| endpoint.address);
    service
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Duration};

    use tokio::time::timeout;

    use super::*;

    fn documents(files: &[(&str, &str)]) -> (tempfile::TempDir, Documents) {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(folder.path().join(name), text).unwrap();
        }
        let documents = Documents::new(folder.path());
        (folder, documents)
    }

    fn addresses(services: &[Service]) -> Vec<String> {
        let of = |service: &Service| {
            let endpoints = service.endpoints.iter().map(|endpoint| endpoint.address.to_string());
            format!("{}: {}", service.name, endpoints.collect::<Vec<_>>().join(" "))
        };
        services.iter().map(of).collect()
    }

    #[test]
    fn several_documents_add_up_to_one_service() {
        let (_folder, mut documents) = documents(&[
            ("orders.b.yaml", "service: orders\nendpoints: [{address: 10.0.0.2:1}, {address: 10.0.0.1:1}]"),
            (
                "orders.a.yaml",
                "service: orders\nprotocol: http1\nendpoints: [{address: 10.0.0.1:1, weight: 7}]",
            ),
            ("cart.yml", "service: cart\nidentities: [spiffe://d/ns/a/sa/b]\naddresses: [10.9.9.9:80]"),
        ]);
        let (services, mistakes) = documents.look(SystemTime::now());
        assert_eq!(mistakes, []);
        assert_eq!(addresses(&services), ["cart: ", "orders: 10.0.0.1:1 10.0.0.2:1"]);
        assert_eq!(services[1].protocol, Some(Protocol::Http1));
        assert_eq!(services[1].endpoints[0].weight, 100);
        assert_eq!(services[0].identities.len(), 1);
        assert_eq!(services[0].addresses.len(), 1);
    }

    #[test]
    fn a_contradiction_names_both_files_and_the_first_counts() {
        let (folder, mut documents) = documents(&[
            ("a.yaml", "service: orders\nprotocol: http1"),
            ("b.yaml", "service: orders\n\nprotocol: tcp\nendpoints: [{address: 10.0.0.1:1}]"),
        ]);
        let (services, mistakes) = documents.look(SystemTime::now());
        assert_eq!(services[0].protocol, Some(Protocol::Http1));
        assert_eq!(addresses(&services), ["orders: 10.0.0.1:1"]);
        let [mistake] = &mistakes[..] else { panic!("{mistakes:?}") };
        let a = folder.path().join("a.yaml");
        assert_eq!(
            mistake.text,
            format!(
                "`protocol` of orders is tcp, but {}:2 says http1; expected the same in both",
                a.display()
            )
        );
        assert_eq!((mistake.file.clone(), mistake.line), (folder.path().join("b.yaml"), Some(3)));
    }

    #[test]
    fn a_leased_document_counts_while_it_is_touched() {
        let (folder, mut documents) =
            documents(&[("a.yaml", "service: orders\nlease: 30s\nendpoints: [{address: 10.0.0.1:1}]")]);
        let file = fs::File::open(folder.path().join("a.yaml")).unwrap();
        let now = SystemTime::now();
        for (age, expected) in [(0, 1), (29, 1), (31, 0), (5, 1)] {
            file.set_modified(now - Duration::from_secs(age)).unwrap();
            assert_eq!(documents.look(now).0.len(), expected, "{age} seconds after a touch");
        }
        file.set_modified(now + Duration::from_secs(3600)).unwrap();
        assert_eq!(documents.look(now).0.len(), 1, "the publisher's clock runs ahead");
    }

    #[test]
    fn endpoints_are_bounded_in_all() {
        let many = |service: &str, count: usize| {
            let one = |at: usize| format!("{{address: 10.{}.{}.1:80}}", at / 256, at % 256);
            format!("service: {service}\nendpoints: [{}]", (0..count).map(one).collect::<Vec<_>>().join(", "))
        };
        let (_folder, mut documents) = documents(&[
            ("a.yaml", &many("a", MAX_ENDPOINTS - 1)),
            ("b.yaml", &many("b", 2)),
            ("c.yaml", &many("c", 1)),
            ("d.yaml", &many("d", MAX_ENDPOINTS + 1)),
        ]);
        let (services, mistakes) = documents.look(SystemTime::now());
        assert_eq!(services.iter().map(|service| service.name.as_str()).collect::<Vec<_>>(), ["a", "c"]);
        let files: Vec<_> = mistakes.iter().map(|mistake| mistake.file.file_name().unwrap()).collect();
        assert_eq!(files, ["d.yaml", "b.yaml"], "{mistakes:?}");
    }

    #[tokio::test]
    async fn changes_are_published_and_mistakes_too() {
        let folder = tempfile::tempdir().unwrap();
        let (sender, mut directory) = watch::channel(Arc::default());
        let (mistake_sender, mut mistakes) = watch::channel(Vec::new());
        let settings = Settings { folder: folder.path().to_owned() };
        let task = tokio::spawn(run(settings, sender, mistake_sender));
        directory.changed().await.unwrap();
        assert_eq!(directory.borrow_and_update().services().len(), 0);

        let orders: ServiceName = "orders".parse().unwrap();
        let file = folder.path().join("orders.yaml");
        fs::write(&file, "service: orders\nendpoints: [{address: 10.0.0.1:1}]").unwrap();
        directory.changed().await.unwrap();
        let first = Arc::clone(directory.borrow_and_update().service(&orders).unwrap());
        assert_eq!(first.endpoints.len(), 1);

        fs::write(&file, "service: orders\nendpoint: []").unwrap();
        mistakes.changed().await.unwrap();
        assert!(
            mistakes.borrow_and_update()[0].to_string().contains("orders.yaml:2: `endpoint` is an unknown")
        );
        assert!(Arc::ptr_eq(&first, directory.borrow().service(&orders).unwrap()));
        assert!(!directory.has_changed().unwrap());

        fs::remove_file(&file).unwrap();
        directory.changed().await.unwrap();
        assert!(directory.borrow_and_update().service(&orders).is_none());
        mistakes.changed().await.unwrap();
        assert!(mistakes.borrow().is_empty());

        drop(directory);
        timeout(Duration::from_secs(30), task).await.expect("ends when nobody listens").unwrap();
    }
}
