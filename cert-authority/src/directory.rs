//! A directory that nobody else may read: mode 0700, its files 0600, all of them ours. Whatever is wider, a
//! symbolic link, or somebody else's is refused with the command that mends it.
//!
//! A file is replaced whole (write aside, sync, rename), so that a crash leaves the old one or the new one.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{ErrorKind, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use nix::{fcntl::OFlag, unistd::geteuid};

/// A private directory.
#[derive(Debug, Clone)]
pub struct Directory(PathBuf);

/// No file of ours is larger.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

impl Directory {
    /// Takes an existing directory.
    ///
    /// # Errors
    /// It does not exist, is none, is not ours, or others may enter it.
    pub fn open(path: &Path) -> Result<Self> {
        let data = fs::symlink_metadata(path).with_context(|| format!("directory {}", path.display()))?;
        if !data.is_dir() {
            bail!("{} is not a directory", path.display());
        }
        check_owner(path, data.uid())?;
        check_mode(path, data.mode(), "0700")?;
        Ok(Directory(path.to_owned()))
    }

    /// Makes the directory, or takes an empty one.
    ///
    /// # Errors
    /// It holds something already, or [`Directory::open`] refuses it.
    pub fn create(path: &Path) -> Result<Self> {
        match DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).with_context(|| format!("making directory {}", path.display())),
        }
        let directory = Self::open(path)?;
        if let Some(name) = directory.names()?.first() {
            bail!(
                "directory {} is not empty (it holds {name}); nothing in it was touched. An authority that is \
                 there is started with `weft-ca serve`",
                path.display()
            );
        }
        Ok(directory)
    }

    /// A private directory inside, made where it is missing.
    ///
    /// # Errors
    /// As [`Directory::open`].
    pub fn inside(&self, name: &str) -> Result<Self> {
        let path = self.path(name);
        match DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error).with_context(|| format!("making directory {}", path.display())),
        }
        Self::open(&path)
    }

    /// The path of a file inside.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The files inside, by name, hidden ones left out.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn names(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.0).with_context(|| format!("directory {}", self.0.display()))? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if !name.starts_with('.') {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// Reads a file; `None` where there is none.
    ///
    /// # Errors
    /// It is a link, not ours, readable by others, or larger than 1 MiB.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let path = self.path(name);
        let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let file = match OpenOptions::new().read(true).custom_flags(flags.bits()).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) if error.raw_os_error() == Some(nix::errno::Errno::ELOOP as i32) => {
                bail!("{} is a symbolic link; put the file itself there", path.display())
            }
            Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
        };
        let data = file.metadata().with_context(|| format!("reading {}", path.display()))?;
        if !data.is_file() {
            bail!("{} is not a file", path.display());
        }
        check_owner(&path, data.uid())?;
        check_mode(&path, data.mode(), "0600")?;
        let mut bytes = Vec::new();
        file.take(MAX_FILE_BYTES + 1)
            .read_to_end(&mut bytes)
            .with_context(|| format!("reading {}", path.display()))?;
        if bytes.len() as u64 > MAX_FILE_BYTES {
            bail!("{} is larger than {MAX_FILE_BYTES} bytes", path.display());
        }
        Ok(Some(bytes))
    }

    /// Replaces a file, or makes it.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.path(name);
        write_private(&path, bytes).with_context(|| format!("writing {}", path.display()))
    }

    /// Renames a file inside, and has the disk know it: of several callers exactly one succeeds.
    ///
    /// # Errors
    /// What the file system says, [`ErrorKind::NotFound`] where somebody was first.
    pub fn rename(&self, from: &str, to: &str) -> std::io::Result<()> {
        fs::rename(self.path(from), self.path(to))?;
        sync(&self.0)
    }

    /// Removes a file, and has the disk know it; false where there was none.
    ///
    /// # Errors
    /// What the file system says.
    pub fn remove(&self, name: &str) -> Result<bool> {
        let removed = self.remove_unsynced(name)?;
        if removed {
            self.sync()?;
        }
        Ok(removed)
    }

    /// Removes a file, which outlasts a power failure only after [`Directory::sync`]; false where there was none.
    ///
    /// # Errors
    /// What the file system says.
    pub fn remove_unsynced(&self, name: &str) -> Result<bool> {
        let path = self.path(name);
        match fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error).with_context(|| format!("removing {}", path.display())),
        }
    }

    /// Has the disk know what was removed.
    ///
    /// # Errors
    /// What the file system says.
    pub fn sync(&self) -> Result<()> {
        sync(&self.0).with_context(|| format!("syncing directory {}", self.0.display()))
    }
}

/// Writes a file of mode 0600 aside, syncs it, and moves it into place.
///
/// # Errors
/// What the file system says.
pub fn write_private(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let aside = folder.join(format!(".{name}.{}", std::process::id()));
    let _ = fs::remove_file(&aside);
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&aside)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&aside, path))
        .and_then(|()| sync(folder));
    if written.is_err() {
        let _ = fs::remove_file(&aside);
    }
    written
}

/// What was renamed or removed in a directory outlasts a power failure only once the directory itself is synced.
fn sync(folder: &Path) -> std::io::Result<()> {
    File::open(folder)?.sync_all()
}

fn check_owner(path: &Path, owner: u32) -> Result<()> {
    let own = geteuid().as_raw();
    if owner != own {
        bail!(
            "{} belongs to user {owner} and this is user {own}; run as its owner, or `chown {own} {}`",
            path.display(),
            path.display()
        );
    }
    Ok(())
}

fn check_mode(path: &Path, mode: u32, wanted: &str) -> Result<()> {
    if mode & 0o077 != 0 {
        bail!(
            "{} has mode {:04o}, so others may reach it; keys are kept here. Find out who could have read it, \
             then `chmod {wanted} {}`",
            path.display(),
            mode & 0o7777,
            path.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn private() -> (tempfile::TempDir, Directory) {
        let outer = tempfile::tempdir().unwrap();
        let directory = Directory::create(&outer.path().join("d")).unwrap();
        (outer, directory)
    }

    #[test]
    fn a_file_is_written_private_and_read_back() {
        let (_outer, directory) = private();
        assert_eq!(directory.read("a").unwrap(), None);
        directory.write("a", b"one").unwrap();
        directory.write("a", b"two").unwrap();
        assert_eq!(directory.read("a").unwrap().unwrap(), b"two");
        assert_eq!(fs::metadata(directory.path("a")).unwrap().mode() & 0o777, 0o600);
        assert_eq!(directory.names().unwrap(), ["a"], "nothing was left aside");
        assert!(directory.remove("a").unwrap() && !directory.remove("a").unwrap());
    }

    #[test]
    fn wider_permissions_and_links_are_refused_with_the_cure() {
        let (outer, directory) = private();
        directory.write("a", b"one").unwrap();
        fs::set_permissions(directory.path("a"), fs::Permissions::from_mode(0o640)).unwrap();
        let error = directory.read("a").unwrap_err().to_string();
        assert!(error.contains("mode 0640") && error.contains("chmod 0600"), "{error}");
        symlink(directory.path("a"), directory.path("b")).unwrap();
        assert!(directory.read("b").unwrap_err().to_string().contains("symbolic link"));
        let path = outer.path().join("d");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o750)).unwrap();
        let error = Directory::open(&path).unwrap_err().to_string();
        assert!(error.contains("mode 0750") && error.contains("chmod 0700"), "{error}");
    }

    #[test]
    fn only_an_empty_directory_is_taken_for_a_new_authority() {
        let (outer, directory) = private();
        assert!(Directory::create(&outer.path().join("d")).is_ok());
        directory.write("a", b"one").unwrap();
        let error = Directory::create(&outer.path().join("d")).unwrap_err().to_string();
        assert!(error.contains("not empty"), "{error}");
    }
}
