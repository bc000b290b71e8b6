//! Traffic policies from a watched folder: one document per service, named `<service>.yaml` (docs/policy.md).
//! Changes apply at once; a document with a mistake is refused and reported, and the last good one stays.

use std::{
    collections::{BTreeMap, HashMap},
    mem,
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::{sync::watch, task::spawn_blocking};

use super::folder::{Folder, Watch, log_new, take_over};
use crate::{
    config::{
        document::{EXPECTED_NAME, Mistake},
        policy_document,
    },
    model::{Policy, ServiceName},
};

/// Policies by service. A policy that did not change keeps its `Arc`.
pub type Policies = HashMap<ServiceName, Arc<Policy>>;

/// Where the documents are.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The folder with the documents.
    pub folder: PathBuf,
    /// What a document does not say.
    pub defaults: Policy,
}

/// Watches the folder and publishes the policies at the first look and at every change; and with them all
/// mistakes that stand in the documents now. Ends when nobody listens for the policies any more.
pub async fn run(
    settings: Settings,
    policies: watch::Sender<Arc<Policies>>,
    mistakes: watch::Sender<Vec<Mistake>>,
) {
    let mut watch = Watch::new(&settings.folder);
    let mut documents = Documents::new(&settings.folder, settings.defaults);
    let mut first = true;
    loop {
        let looked = spawn_blocking(move || {
            let found = documents.look();
            (documents, found)
        });
        // The look does not panic; if it did, whoever started us would have to know.
        let Ok((same, (newer, found))) = looked.await else {
            panic!("the look at a folder of documents ended with a panic");
        };
        documents = same;
        if mem::take(&mut first) || !same_policies(&policies.borrow(), &newer) {
            policies.send_replace(Arc::new(newer));
        }
        log_new("policy", &mistakes.borrow(), &found);
        mistakes.send_if_modified(|known| {
            let changed = *known != found;
            *known = found;
            changed
        });
        tokio::select! {
            () = watch.changed() => {}
            () = policies.closed() => return,
        }
    }
}

fn same_policies(known: &Policies, newer: &Policies) -> bool {
    known.len() == newer.len()
        && known.iter().all(|(name, policy)| newer.get(name).is_some_and(|other| Arc::ptr_eq(policy, other)))
}

/// The documents of the folder as last read without mistakes.
struct Documents {
    folder: Folder,
    defaults: Policy,
    good: BTreeMap<PathBuf, Arc<Policy>>,
    bad: BTreeMap<PathBuf, Vec<Mistake>>,
}

impl Documents {
    fn new(folder: &Path, defaults: Policy) -> Self {
        let folder = Folder::new(folder);
        Documents { folder, defaults, good: BTreeMap::new(), bad: BTreeMap::new() }
    }

    /// Looks at the folder once: the policies now, and every mistake.
    fn look(&mut self) -> (Policies, Vec<Mistake>) {
        let look = self.folder.look();
        let mut mistakes: Vec<Mistake> = look.mistake.clone().into_iter().collect();
        take_over(look, &mut self.good, &mut self.bad, |text, mistakes| {
            policy_document::read(text, &self.defaults, mistakes).map(Arc::new)
        });
        mistakes.extend(self.bad.values().flatten().cloned());
        let mut policies = Policies::new();
        for (file, policy) in &self.good {
            match service_of(file) {
                None => mistakes.push(mistake(
                    file,
                    format!("the name of the file is no service; expected {EXPECTED_NAME}, then .yaml"),
                )),
                Some(name) if policies.contains_key(&name) => {
                    mistakes
                        .push(mistake(file, format!("{name} has another policy already; expected one file")));
                }
                Some(name) => drop(policies.insert(name, Arc::clone(policy))),
            }
        }
        (policies, mistakes)
    }
}

fn service_of(file: &Path) -> Option<ServiceName> {
    file.file_stem()?.to_str()?.parse().ok()
}

fn mistake(file: &Path, text: String) -> Mistake {
    Mistake { file: file.to_owned(), line: None, text }
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Duration};

    use tokio::time::timeout;

    use super::*;

    fn name(text: &str) -> ServiceName {
        text.parse().unwrap()
    }

    #[test]
    fn the_file_names_the_service_and_names_it_once() {
        let folder = tempfile::tempdir().unwrap();
        for (file, text) in [
            ("orders.yaml", "retries: {attempts: 1}"),
            ("orders.yml", "retries: {attempts: 5}"),
            ("cart_shop.yml", "{}"),
            ("Not A Service.yaml", "{}"),
            ("broken.yaml", "retries: {attempts: 11}"),
        ] {
            fs::write(folder.path().join(file), text).unwrap();
        }
        let (policies, mistakes) = Documents::new(folder.path(), Policy::default()).look();
        let mut names: Vec<_> = policies.keys().map(ServiceName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["cart_shop", "orders"]);
        assert_eq!(policies[&name("orders")].retries.attempts, 1);
        let files: Vec<_> = mistakes.iter().map(|one| one.file.file_name().unwrap().to_owned()).collect();
        assert_eq!(files, ["broken.yaml", "Not A Service.yaml", "orders.yml"], "{mistakes:?}");
    }

    #[tokio::test]
    async fn a_change_applies_and_a_bad_one_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("orders.yaml");
        fs::write(folder.path().join("cart.yaml"), "{}").unwrap();
        let (sender, mut policies) = watch::channel(Arc::default());
        let (mistake_sender, mut mistakes) = watch::channel(Vec::new());
        let settings = Settings { folder: folder.path().to_owned(), defaults: Policy::default() };
        let task = tokio::spawn(run(settings, sender, mistake_sender));
        policies.changed().await.unwrap();
        let cart = Arc::clone(&policies.borrow_and_update()[&name("cart")]);

        fs::write(&file, "retries: {attempts: 7}").unwrap();
        policies.changed().await.unwrap();
        assert_eq!(policies.borrow_and_update()[&name("orders")].retries.attempts, 7);
        assert!(Arc::ptr_eq(&cart, &policies.borrow()[&name("cart")]), "unchanged");

        fs::write(&file, "retries: {attempts: 11}").unwrap();
        mistakes.changed().await.unwrap();
        assert!(
            mistakes.borrow_and_update()[0].to_string().contains("orders.yaml:1: `retries.attempts` is 11")
        );
        assert_eq!(policies.borrow()[&name("orders")].retries.attempts, 7, "the last good one stays");

        fs::remove_file(&file).unwrap();
        policies.changed().await.unwrap();
        assert!(!policies.borrow_and_update().contains_key(&name("orders")));

        drop(policies);
        timeout(Duration::from_secs(30), task).await.expect("ends when nobody listens").unwrap();
    }
}
