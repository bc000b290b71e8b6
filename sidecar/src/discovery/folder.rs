//! A watched folder of YAML documents: which files are new, changed or gone since the last look. inotify tells
//! at once; a slow look every few seconds is the safety net (network file systems, a folder made anew, overflow
//! of the event queue). Links are followed, for ConfigMaps are made of them. What the documents mean, and which
//! last good content stays in use, is the business of the readers.

use std::{
    collections::BTreeMap,
    fs, io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::{
    io::unix::AsyncFd,
    time::{sleep, timeout},
};

use super::files::read_regular;
use crate::config::document::{Mistake, Mistakes};

/// Look at the folder this often even if nothing was reported.
const SLOW_LOOK: Duration = Duration::from_secs(5);
/// Changes come in bursts: wait this long and look once.
const BURST: Duration = Duration::from_millis(20);
/// The longest document.
const MAX_FILE_BYTES: u64 = 1024 * 1024;
/// Documents in one folder; further ones, in the order of their names, are not read.
const MAX_FILES: usize = 10_000;

/// What is known of the files in a folder. Its methods block on the file system.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    stamps: BTreeMap<PathBuf, Stamp>,
}

/// A file that has the same stamp has the same content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    length: u64,
    modified: SystemTime,
    changed: (i64, i64),
}

/// What one look at the folder found.
#[derive(Debug, Default)]
pub(super) struct Look {
    /// New or changed documents, with their text or why it could not be read.
    pub(super) changed: Vec<(PathBuf, Result<String, Mistake>)>,
    /// Documents that are there no more.
    pub(super) gone: Vec<PathBuf>,
    /// Something wrong with the folder itself.
    pub(super) mistake: Option<Mistake>,
}

impl Folder {
    pub(super) fn new(path: &Path) -> Self {
        Folder { path: path.to_owned(), stamps: BTreeMap::new() }
    }

    /// When a document was last touched.
    pub(super) fn modified(&self, file: &Path) -> Option<SystemTime> {
        self.stamps.get(file).map(|stamp| stamp.modified)
    }

    /// Looks once. A folder that cannot be read changes nothing.
    pub(super) fn look(&mut self) -> Look {
        let mut look = Look::default();
        let mut stamps = match documents(&self.path) {
            Ok(stamps) => stamps,
            Err(error) => {
                look.mistake = Some(mistake(&self.path, format!("the folder cannot be read: {error}")));
                return look;
            }
        };
        if let Some(last) = stamps.keys().nth(MAX_FILES).cloned() {
            look.mistake =
                Some(mistake(&self.path, format!("more than {MAX_FILES} documents; the rest is not read")));
            stamps.split_off(&last);
        }
        look.gone = self.stamps.keys().filter(|file| !stamps.contains_key(*file)).cloned().collect();
        for (file, stamp) in &stamps {
            if self.stamps.get(file) != Some(stamp) {
                look.changed.push((file.clone(), read_text(file)));
            }
        }
        self.stamps = stamps;
        look
    }
}

/// The documents of a folder by path. A file that vanishes while we look is not there.
fn documents(folder: &Path) -> io::Result<BTreeMap<PathBuf, Stamp>> {
    let mut stamps = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if !is_document(&path) {
            continue;
        }
        if let Ok(about) = fs::metadata(&path)
            && about.is_file()
        {
            stamps.insert(path, stamp(&about)?);
        }
    }
    Ok(stamps)
}

/// `*.yaml` and `*.yml`, but nothing that begins with a dot: editors and our own writing leave such files.
fn is_document(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or(".");
    !name.starts_with('.') && (name.ends_with(".yaml") || name.ends_with(".yml"))
}

fn stamp(about: &fs::Metadata) -> io::Result<Stamp> {
    Ok(Stamp {
        device: about.dev(),
        inode: about.ino(),
        length: about.len(),
        modified: about.modified()?,
        changed: (about.ctime(), about.ctime_nsec()),
    })
}

fn read_text(file: &Path) -> Result<String, Mistake> {
    let bytes = read_regular(file, MAX_FILE_BYTES)
        .map_err(|error| mistake(file, format!("cannot be read: {error}")))?;
    String::from_utf8(bytes).map_err(|error| {
        mistake(file, format!("is not UTF-8 text after byte {}", error.utf8_error().valid_up_to()))
    })
}

fn mistake(file: &Path, text: String) -> Mistake {
    Mistake { file: file.to_owned(), line: None, text }
}

/// Takes over a look: what parses replaces the last good content, what does not leaves it in use.
pub(super) fn take_over<T>(
    look: Look,
    good: &mut BTreeMap<PathBuf, T>,
    bad: &mut BTreeMap<PathBuf, Vec<Mistake>>,
    read: impl Fn(&str, &mut Mistakes) -> Option<T>,
) {
    for file in look.gone {
        good.remove(&file);
        bad.remove(&file);
    }
    for (file, text) in look.changed {
        let content = text.map_err(|mistake| vec![mistake]).and_then(|text| {
            let mut mistakes = Mistakes::new(&file);
            // What one document does to its reader is no reason to forget the others.
            let content = catch_unwind(AssertUnwindSafe(|| read(&text, &mut mistakes))).map_err(|_| {
                vec![mistake(&file, "reading it ended with a panic, a bug of ours".to_owned())]
            })?;
            mistakes.or_else(content)
        });
        match content {
            Ok(content) => {
                bad.remove(&file);
                good.extend(content.map(|content| (file, content)));
            }
            Err(mistakes) => {
                bad.insert(file, mistakes);
            }
        }
    }
}

/// Says in the log which mistakes are new.
pub(super) fn log_new(what: &str, known: &[Mistake], now: &[Mistake]) {
    for mistake in now.iter().filter(|mistake| !known.contains(mistake)) {
        tracing::warn!("{what} {mistake}; what was last read without mistakes stays in use");
    }
}

/// Waits for changes of a folder.
#[derive(Debug)]
pub(super) struct Watch {
    path: PathBuf,
    events: Option<(Inotify, AsyncFd<OwnedFd>)>,
}

impl Watch {
    /// Without inotify (a limit is reached) only the slow look is left; the log says so.
    pub(super) fn new(path: &Path) -> Self {
        let events = open_inotify()
            .inspect_err(|error| {
                tracing::warn!(
                    "{}: no inotify ({error}); changes are seen within {SLOW_LOOK:?}",
                    path.display()
                );
            })
            .ok();
        let watch = Watch { path: path.to_owned(), events };
        watch.watch_again();
        watch
    }

    /// Returns when the folder may have changed, and at the latest after the time of the slow look.
    pub(super) async fn changed(&mut self) {
        let Some((inotify, ready)) = &self.events else { return sleep(SLOW_LOOK).await };
        if let Ok(Ok(mut guard)) = timeout(SLOW_LOOK, ready.readable()).await {
            sleep(BURST).await;
            while inotify.read_events().is_ok_and(|events| !events.is_empty()) {}
            guard.clear_ready();
        } else {
            // The folder may be a new one under the old name; watching the same one again changes nothing.
            self.watch_again();
        }
    }

    fn watch_again(&self) {
        if let Some((inotify, _)) = &self.events {
            let flags = AddWatchFlags::IN_CLOSE_WRITE
                | AddWatchFlags::IN_MOVED_TO
                | AddWatchFlags::IN_MOVED_FROM
                | AddWatchFlags::IN_DELETE
                | AddWatchFlags::IN_ONLYDIR;
            // A folder that is not there is reported by the look.
            let _ = inotify.add_watch(&self.path, flags);
        }
    }
}

#[expect(
    deprecated,
    reason = "`AsyncFd::new` is unsound for types without I/O safety only; an OwnedFd has it"
)]
fn open_inotify() -> io::Result<(Inotify, AsyncFd<OwnedFd>)> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    let ready = AsyncFd::new(inotify.as_fd().try_clone_to_owned()?)?;
    Ok((inotify, ready))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(look: &Look) -> Vec<String> {
        let name = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
        let changed = look.changed.iter().map(|(path, text)| match text {
            Ok(text) => format!("{} {text}", name(path)),
            Err(mistake) => format!("{} {}", name(path), mistake.text),
        });
        changed.chain(look.gone.iter().map(|path| format!("-{}", name(path)))).collect()
    }

    #[test]
    fn a_look_tells_what_is_new_changed_and_gone() {
        let temporary = tempfile::tempdir().unwrap();
        let at = |name: &str| temporary.path().join(name);
        let mut folder = Folder::new(temporary.path());
        assert_eq!(names(&folder.look()), [""; 0]);
        for name in ["a.yaml", "b.yml", ".c.yaml", "d.txt", "e.yaml~"] {
            fs::write(at(name), "1").unwrap();
        }
        fs::create_dir(at("f.yaml")).unwrap();
        nix::unistd::mkfifo(&at("g.yaml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::os::unix::fs::symlink(at("d.txt"), at("h.yaml")).unwrap();
        std::os::unix::fs::symlink(at("nowhere"), at("i.yaml")).unwrap();
        assert_eq!(names(&folder.look()), ["a.yaml 1", "b.yml 1", "h.yaml 1"]);
        assert_eq!(names(&folder.look()), [""; 0]);
        fs::write(at("a.yaml"), "22").unwrap();
        fs::remove_file(at("b.yml")).unwrap();
        fs::write(at("j.yaml"), [0xff]).unwrap();
        assert_eq!(names(&folder.look()), ["a.yaml 22", "j.yaml is not UTF-8 text after byte 0", "-b.yml"]);
    }

    #[test]
    fn a_folder_that_cannot_be_read_changes_nothing() {
        let temporary = tempfile::tempdir().unwrap();
        let path = temporary.path().join("services");
        let mut folder = Folder::new(&path);
        assert!(folder.look().mistake.unwrap().to_string().contains("cannot be read"));
        fs::create_dir(&path).unwrap();
        fs::write(path.join("a.yaml"), "1").unwrap();
        assert_eq!(names(&folder.look()), ["a.yaml 1"]);
        fs::rename(&path, temporary.path().join("away")).unwrap();
        let look = folder.look();
        assert!(look.mistake.is_some() && look.gone.is_empty());
    }

    #[test]
    fn a_bad_file_leaves_its_last_good_content() {
        let (mut good, mut bad) = (BTreeMap::new(), BTreeMap::new());
        let file = PathBuf::from("a.yaml");
        let mut take = |text: &str| {
            let look = Look { changed: vec![(file.clone(), Ok(text.to_owned()))], ..Look::default() };
            take_over(look, &mut good, &mut bad, |text, mistakes| match text.parse::<u8>() {
                Ok(number) => Some(number),
                Err(_) if text == "bug" => panic!("a bug, for this test"),
                Err(error) => {
                    mistakes.add(Some(1), error.to_string());
                    None
                }
            });
            (good.get(&file).copied(), bad.len())
        };
        assert_eq!(take("one"), (None, 1));
        assert_eq!(take("1"), (Some(1), 0));
        assert_eq!(take("two"), (Some(1), 1));
        assert_eq!(take("bug"), (Some(1), 1));
        assert_eq!(take("2"), (Some(2), 0));
    }

    #[tokio::test]
    async fn a_change_is_told_soon_and_a_folder_made_later_is_found() {
        let temporary = tempfile::tempdir().unwrap();
        let path = temporary.path().join("services");
        fs::create_dir(&path).unwrap();
        let mut watch = Watch::new(&path);
        let soon = SLOW_LOOK - Duration::from_secs(1);
        for step in 0..3 {
            match step {
                0 => fs::write(path.join("a.yaml"), "1").unwrap(),
                1 => fs::rename(path.join("a.yaml"), path.join("b.yaml")).unwrap(),
                _ => fs::remove_file(path.join("b.yaml")).unwrap(),
            }
            timeout(soon, watch.changed()).await.expect("told by inotify");
        }
        assert!(timeout(BURST * 10, watch.changed()).await.is_err(), "told without a change");
    }
}
