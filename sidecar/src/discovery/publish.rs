//! Publishes our own workload as a document in the folder that other sidecars watch (docs/services.md), and takes
//! it away in a drain. The document carries a lease and is touched every few seconds: after a crash it stays on
//! disk and counts no longer. Written beside its place and renamed into it, mode 0644.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use tokio::{sync::oneshot, task::JoinHandle, time::interval};
use weft_proto::spiffe::SpiffeId;

use super::files::{read_regular, write_atomically};
use crate::model::{Endpoint, Protocol, ServiceName};

/// Readers believe a document this long after it was touched.
const LEASE: Duration = Duration::from_secs(30);
/// How often it is touched.
const TOUCH: Duration = Duration::from_secs(10);

/// What a sidecar says of the app beside it.
#[derive(Debug, Clone, PartialEq)]
pub struct Workload {
    /// The service it belongs to.
    pub service: ServiceName,
    /// What tells it from the other workloads of the service: 1 to 100 of a-z A-Z 0-9 `.` `_` `-`.
    pub instance: String,
    /// What it speaks, where declared.
    pub protocol: Option<Protocol>,
    /// Whom a client meets there.
    pub identities: Vec<SpiffeId>,
    /// Where it is reached.
    pub endpoint: Endpoint,
}

/// A published workload. Dropping it takes the document away too.
#[derive(Debug)]
pub struct Published {
    path: PathBuf,
    stop: Option<oneshot::Sender<()>>,
    touching: Option<JoinHandle<()>>,
}

/// Writes the document `<service>.<instance>.yaml` into `folder` and keeps its lease.
///
/// # Errors
/// What the file system says; `InvalidInput` for an instance that is no part of a file name.
pub fn publish(folder: &Path, workload: &Workload) -> io::Result<Published> {
    let path = folder.join(file_name(workload)?);
    let text = document(workload);
    write_atomically(&path, text.as_bytes(), 0o644)?;
    let (stop, stopped) = oneshot::channel();
    let touching = tokio::spawn(keep(path.clone(), text, stopped));
    Ok(Published { path, stop: Some(stop), touching: Some(touching) })
}

impl Published {
    /// Takes the document away. When it returns, no reader will find it again.
    ///
    /// # Errors
    /// What the file system says; a document that is gone already is none.
    pub async fn withdraw(mut self) -> io::Result<()> {
        drop(self.stop.take());
        if let Some(touching) = self.touching.take() {
            // It ends between two touches: afterwards nobody writes the document again.
            let _ = touching.await;
        }
        remove(&self.path)
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        if let Some(touching) = self.touching.take() {
            touching.abort();
            let _ = remove(&self.path);
        }
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Touches the document until it is withdrawn; one that somebody removed or overwrote is written again.
async fn keep(path: PathBuf, text: String, mut stopped: oneshot::Receiver<()>) {
    let mut ticks = interval(TOUCH);
    loop {
        tokio::select! {
            _ = &mut stopped => return,
            _ = ticks.tick() => {}
        }
        if let Err(error) = keep_once(&path, &text) {
            tracing::warn!("{}: cannot keep our workload published: {error}", path.display());
        }
    }
}

fn keep_once(path: &Path, text: &str) -> io::Result<()> {
    match read_regular(path, text.len() as u64) {
        // Opened for reading: closing a file that was open for writing would wake every reader of the folder.
        Ok(bytes) if bytes == text.as_bytes() => {
            return File::open(path).and_then(|file| file.set_modified(SystemTime::now()));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) if !matches!(error.kind(), io::ErrorKind::FileTooLarge | io::ErrorKind::InvalidInput) => {
            return Err(error);
        }
        _ => tracing::warn!(
            "{}: somebody wrote something else here; our workload is written again. Does another sidecar run as \
             the same --instance?",
            path.display()
        ),
    }
    write_atomically(path, text.as_bytes(), 0o644)
}

fn file_name(workload: &Workload) -> io::Result<String> {
    let instance = &workload.instance;
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if !(1..=100).contains(&instance.len()) || !instance.bytes().all(allowed) {
        let short: String = instance.chars().take(100).collect();
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("instance {short:?} is not 1 to 100 of a-z A-Z 0-9 . _ -"),
        ));
    }
    Ok(format!("{}.{instance}.yaml", workload.service))
}

/// Every value is of a type whose text needs no care in YAML, inside double quotes at the latest.
fn document(workload: &Workload) -> String {
    let Endpoint { address, weight, zone, .. } = &workload.endpoint;
    let mut text = String::from("# Written by a weft sidecar, which touches it while it lives.\n");
    let mut line = |words: std::fmt::Arguments<'_>| {
        let _ = text.write_fmt(words);
        text.push('\n');
    };
    line(format_args!("service: \"{}\"", workload.service));
    if let Some(protocol) = workload.protocol {
        line(format_args!("protocol: {protocol}"));
    }
    if !workload.identities.is_empty() {
        line(format_args!("identities:"));
    }
    for identity in &workload.identities {
        line(format_args!("  - \"{identity}\""));
    }
    line(format_args!("endpoints:\n  - address: \"{address}\"\n    weight: {weight}"));
    if let Some(zone) = zone {
        line(format_args!("    zone: {}", serde_json::Value::from(&**zone)));
    }
    line(format_args!("lease: {}s", LEASE.as_secs()));
    text
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::{config::document::Mistakes, discovery::service_document};

    fn workload() -> Workload {
        Workload {
            service: "orders_shop".parse().unwrap(),
            instance: "10.1.0.2-8080".to_owned(),
            protocol: Some(Protocol::Http1),
            identities: vec!["spiffe://weft.local/ns/shop/sa/orders".parse().unwrap()],
            endpoint: Endpoint {
                weight: 7,
                zone: Some("a".into()),
                ..Endpoint::at("[fd00::2]:8080".parse().unwrap())
            },
        }
    }

    #[test]
    fn readers_understand_the_document() {
        let numeric = Workload { service: "123".parse().unwrap(), ..workload() };
        let bare = Workload {
            protocol: None,
            identities: Vec::new(),
            endpoint: Endpoint::at("10.0.0.1:1".parse().unwrap()),
            ..workload()
        };
        for workload in [workload(), numeric, bare] {
            let mut mistakes = Mistakes::new(Path::new("a.yaml"));
            let read = service_document::read(&document(&workload), &mut mistakes);
            let read = mistakes.or_else(read).unwrap().unwrap();
            assert_eq!(read.service, workload.service);
            assert_eq!(read.protocol.map(|(protocol, _)| protocol), workload.protocol);
            assert_eq!(read.identities, workload.identities);
            assert_eq!(read.endpoints, [workload.endpoint]);
            assert_eq!(read.lease, Some(LEASE));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_document_is_kept_alive_and_taken_away() {
        let folder = tempfile::tempdir().unwrap();
        let published = publish(folder.path(), &workload()).unwrap();
        let path = folder.path().join("orders_shop.10.1.0.2-8080.yaml");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
        let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        tokio::time::sleep(TOUCH / 2).await;
        File::open(&path).unwrap().set_modified(old).unwrap();
        tokio::time::sleep(TOUCH).await;
        assert!(fs::metadata(&path).unwrap().modified().unwrap() > old, "not touched");
        fs::remove_file(&path).unwrap();
        tokio::time::sleep(TOUCH).await;
        assert!(path.exists(), "not written again");
        let ours = fs::read(&path).unwrap();
        for other in ["service: \"orders_shop\"\n", &"#".repeat(2 * ours.len())] {
            fs::write(&path, other).unwrap();
            tokio::time::sleep(TOUCH).await;
            assert_eq!(fs::read(&path).unwrap(), ours, "overwritten, and not written again");
        }
        published.withdraw().await.unwrap();
        tokio::time::sleep(TOUCH * 2).await;
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_guard_that_is_dropped_takes_the_document_away() {
        let folder = tempfile::tempdir().unwrap();
        drop(publish(folder.path(), &workload()).unwrap());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn an_instance_that_is_no_file_name_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        for instance in ["", "../x", "a/b", "a b", "ä", &"x".repeat(101)] {
            let workload = Workload { instance: instance.to_owned(), ..workload() };
            let error = publish(folder.path(), &workload).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{instance:?}");
        }
        assert!(publish(&folder.path().join("none"), &workload()).is_err());
    }
}
