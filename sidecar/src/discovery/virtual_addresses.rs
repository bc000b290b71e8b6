//! Stable addresses for services that have none: from 240.0.0.0/4 (RFC 1112 4, "reserved", routed nowhere). The
//! name's hash picks the first try, so that two sidecars mostly agree; a taken address leads to the next. The
//! table is kept in a file and so survives a restart, and an address is not reused within a day after its
//! service is gone, for apps keep addresses longer than any time to live. Nothing here reaches the network.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use aws_lc_rs::digest;
use serde::{Deserialize, Serialize};

use super::{
    Directory,
    files::{read_regular, write_atomically},
};
use crate::model::{Registered, ServiceName};

/// Services that can have a virtual address at a time.
const MAX_ADDRESSES: usize = 65_536;
/// An address stays with its service for this long after the service was last seen.
const KEPT: Duration = Duration::from_secs(24 * 60 * 60);
/// The longest state file that is read.
const MAX_FILE_BYTES: u64 = 16 * 1024 * 1024;
const FILE_VERSION: u32 = 1;
/// The lowest address: 240.0.0.0 itself is left out, and so is the broadcast address at the other end.
const FIRST: u32 = 0xf000_0001;
const COUNT: u32 = 0x0fff_fffe;

/// Which service has which virtual address. Shared by the DNS responder and the outbound workers.
#[derive(Debug)]
pub struct VirtualAddresses {
    table: Mutex<Table>,
    file: Option<PathBuf>,
    /// Held while the file is written, so that an older table never overwrites a newer one.
    writing: Mutex<()>,
}

#[derive(Debug, Default)]
struct Table {
    by_name: HashMap<ServiceName, Allocation>,
    by_address: HashMap<Ipv4Addr, ServiceName>,
}

#[derive(Debug, Clone, Copy)]
struct Allocation {
    address: Ipv4Addr,
    /// When the service was found missing.
    gone: Option<SystemTime>,
}

/// Is this an address that only we hand out?
pub fn is_virtual(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(address) => address.octets()[0] >= 240,
        IpAddr::V6(_) => false,
    }
}

impl VirtualAddresses {
    /// A table that is forgotten at the end of the process.
    pub fn in_memory() -> Self {
        VirtualAddresses { table: Mutex::default(), file: None, writing: Mutex::default() }
    }

    /// A table kept in `file` (mode 0600). A file that cannot be read or believed is reported in the log and
    /// replaced at the next allocation; most names get the same address again then, because of the hash.
    pub fn open(file: &Path, now: SystemTime) -> Self {
        let table = load(file, now).unwrap_or_else(|reason| {
            tracing::warn!("virtual addresses {}: {reason}; starting with none", file.display());
            Table::default()
        });
        VirtualAddresses { table: Mutex::new(table), file: Some(file.to_owned()), writing: Mutex::default() }
    }

    /// The table that the bytes of a state file hold, not kept in any file.
    ///
    /// # Errors
    /// What is not to be believed.
    pub fn from_bytes(bytes: &[u8], now: SystemTime) -> Result<Self, String> {
        Ok(VirtualAddresses { table: Mutex::new(read(bytes, now)?), ..VirtualAddresses::in_memory() })
    }

    /// The address of a service; allocated at the first call. None where all are taken.
    pub fn address_of(&self, name: &ServiceName, now: SystemTime) -> Option<Ipv4Addr> {
        let (address, changed) = self.table().allocate(name, now)?;
        if changed {
            self.save();
        }
        Some(address)
    }

    /// The service that has this address.
    pub fn name_of(&self, address: IpAddr) -> Option<ServiceName> {
        match address.to_canonical() {
            IpAddr::V4(address) => self.table().by_address.get(&address).cloned(),
            IpAddr::V6(_) => None,
        }
    }

    /// Notes which services are gone and forgets those that have been for a day. To be called when the directory
    /// changed, and now and then.
    pub fn follow(&self, directory: &Directory, now: SystemTime) {
        let is_known = |name: &ServiceName| {
            directory.service(name).is_some_and(|service| service.registered == Registered::Yes)
        };
        let changed = self.table().follow(is_known, now);
        if changed {
            self.save();
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A table that cannot be saved still serves; the log says what will be lost.
    fn save(&self) {
        let Some(file) = &self.file else { return };
        let _one_at_a_time = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let written = self.table().to_file();
        let saved = serde_json::to_vec(&written)
            .map_err(io::Error::from)
            .and_then(|bytes| write_atomically(file, &bytes, 0o600));
        if let Err(error) = saved {
            tracing::warn!(
                "virtual addresses {}: cannot be saved: {error}; a restart may change them",
                file.display()
            );
        }
    }
}

impl Table {
    /// The address, and whether the table changed.
    fn allocate(&mut self, name: &ServiceName, now: SystemTime) -> Option<(Ipv4Addr, bool)> {
        if let Some(known) = self.by_name.get_mut(name) {
            return Some((known.address, known.gone.take().is_some()));
        }
        if self.by_name.len() >= MAX_ADDRESSES {
            self.forget(now);
        }
        if self.by_name.len() >= MAX_ADDRESSES {
            return None;
        }
        let first = first_try(name);
        let address = (0..=MAX_ADDRESSES as u32)
            .map(|step| Ipv4Addr::from(FIRST + (first + step) % COUNT))
            .find(|address| !self.by_address.contains_key(address))?;
        self.insert(name.clone(), Allocation { address, gone: None });
        Some((address, true))
    }

    fn insert(&mut self, name: ServiceName, allocation: Allocation) {
        self.by_address.insert(allocation.address, name.clone());
        self.by_name.insert(name, allocation);
    }

    fn follow(&mut self, is_known: impl Fn(&ServiceName) -> bool, now: SystemTime) -> bool {
        let mut changed = false;
        for (name, allocation) in &mut self.by_name {
            match (is_known(name), allocation.gone) {
                (true, Some(_)) => allocation.gone = None,
                (false, None) => allocation.gone = Some(now),
                _ => continue,
            }
            changed = true;
        }
        self.forget(now) || changed
    }

    fn forget(&mut self, now: SystemTime) -> bool {
        let before = self.by_name.len();
        let over = |gone: SystemTime| now.duration_since(gone).is_ok_and(|age| age >= KEPT);
        self.by_name.retain(|_, allocation| !allocation.gone.is_some_and(over));
        self.by_address.retain(|_, name| self.by_name.contains_key(name));
        self.by_name.len() < before
    }

    fn to_file(&self) -> StateFile {
        let mut addresses: Vec<_> = self
            .by_name
            .iter()
            .map(|(name, allocation)| StateEntry {
                name: name.clone(),
                address: allocation.address,
                gone: allocation.gone.map(to_unix_seconds),
            })
            .collect();
        addresses.sort_by(|one, other| one.name.cmp(&other.name));
        StateFile { version: FILE_VERSION, addresses }
    }
}

/// Where the search for a free address begins: spread evenly, and the same in every sidecar and version.
fn first_try(name: &ServiceName) -> u32 {
    let hash = digest::digest(&digest::SHA256, name.as_str().as_bytes());
    let first = hash.as_ref().iter().take(4).fold(0u32, |number, &byte| number << 8 | u32::from(byte));
    first % COUNT
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StateFile {
    version: u32,
    addresses: Vec<StateEntry>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StateEntry {
    name: ServiceName,
    address: Ipv4Addr,
    /// Seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    gone: Option<u64>,
}

/// Reads the state file; no file is an empty table.
fn load(path: &Path, now: SystemTime) -> Result<Table, String> {
    match read_regular(path, MAX_FILE_BYTES) {
        Ok(bytes) => read(&bytes, now),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Table::default()),
        Err(error) => Err(error.to_string()),
    }
}

/// Reads a table and believes nothing in it.
fn read(bytes: &[u8], now: SystemTime) -> Result<Table, String> {
    let state: StateFile = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    if state.version != FILE_VERSION || state.addresses.len() > MAX_ADDRESSES {
        return Err(format!(
            "version {} with {} addresses; expected version {FILE_VERSION} with at most {MAX_ADDRESSES}",
            state.version,
            state.addresses.len()
        ));
    }
    let mut table = Table::default();
    for StateEntry { name, address, gone } in state.addresses {
        let ours = (FIRST..FIRST + COUNT).contains(&u32::from(address));
        if !ours || table.by_address.contains_key(&address) || table.by_name.contains_key(&name) {
            return Err(format!("`{name}` at {address} is out of range, or doubled"));
        }
        let gone = gone.map(|seconds| from_unix_seconds(seconds, now));
        table.insert(name, Allocation { address, gone });
    }
    Ok(table)
}

fn to_unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Never later than now: a wrong clock must not keep an address for ever.
fn from_unix_seconds(seconds: u64, now: SystemTime) -> SystemTime {
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).map_or(now, |time| time.min(now))
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        os::unix::fs::PermissionsExt,
    };

    use super::*;

    fn name(text: &str) -> ServiceName {
        text.parse().unwrap()
    }

    fn at(hours: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000 + hours * 3600)
    }

    fn directory(names: &[&str]) -> Directory {
        let service = |text: &&str| crate::model::Service::named(name(text));
        Directory::new(names.iter().map(service).collect())
    }

    #[test]
    fn the_range_is_ours_alone() {
        for (address, expected) in [
            ("240.0.0.1", true),
            ("255.255.255.254", true),
            ("255.255.255.255", true),
            ("239.255.255.255", false),
            ("::ffff:240.0.0.1", true),
            ("fd00::1", false),
        ] {
            assert_eq!(is_virtual(address.parse().unwrap()), expected, "{address}");
        }
    }

    #[test]
    fn an_address_leads_back_to_its_name_and_two_sidecars_agree() {
        let (one, other) = (VirtualAddresses::in_memory(), VirtualAddresses::in_memory());
        for number in 0..2_000 {
            let service = name(&format!("service-{number}"));
            let address = one.address_of(&service, at(0)).unwrap();
            assert!(is_virtual(address.into()) && address != Ipv4Addr::BROADCAST);
            assert_eq!(one.address_of(&service, at(1)), Some(address));
            assert_eq!(one.name_of(address.into()), Some(service.clone()));
            assert_eq!(other.address_of(&service, at(0)), Some(address));
        }
        assert_eq!(one.name_of("240.0.0.1".parse().unwrap()), None);
    }

    #[test]
    fn a_taken_address_leads_to_the_next_even_at_the_end_of_the_range() {
        let mut table = Table::default();
        let wanted = first_try(&name("orders"));
        for (step, other) in ["a", "b"].into_iter().enumerate() {
            let address = Ipv4Addr::from(FIRST + (wanted + step as u32) % COUNT);
            table.insert(name(other), Allocation { address, gone: None });
        }
        let (address, _) = table.allocate(&name("orders"), at(0)).unwrap();
        assert_eq!(address, Ipv4Addr::from(FIRST + (wanted + 2) % COUNT));
        assert_eq!(Ipv4Addr::from(FIRST + (COUNT - 1)), Ipv4Addr::new(255, 255, 255, 254));
    }

    #[test]
    fn the_table_is_bounded_and_room_comes_back_after_a_day() {
        let mut table = Table::default();
        for number in 0..MAX_ADDRESSES {
            table.allocate(&name(&format!("s{number}")), at(0)).unwrap();
        }
        assert_eq!(table.allocate(&name("one-more"), at(0)), None);
        table.follow(|name| name.as_str() != "s7", at(1));
        assert_eq!(table.allocate(&name("one-more"), at(24)), None);
        assert!(table.allocate(&name("one-more"), at(25)).is_some());
    }

    #[test]
    fn an_address_is_kept_for_a_day_after_its_service_is_gone() {
        let virtuals = VirtualAddresses::in_memory();
        let address = virtuals.address_of(&name("orders"), at(0)).unwrap();
        virtuals.follow(&directory(&["orders"]), at(1));
        virtuals.follow(&directory(&[]), at(2));
        virtuals.follow(&directory(&[]), at(25));
        assert_eq!(virtuals.name_of(address.into()), Some(name("orders")));
        // It came back in time: the day begins anew when it goes again.
        virtuals.follow(&directory(&["orders"]), at(25));
        virtuals.follow(&directory(&[]), at(26));
        virtuals.follow(&directory(&[]), at(49));
        assert_eq!(virtuals.name_of(address.into()), Some(name("orders")));
        virtuals.follow(&directory(&[]), at(50));
        assert_eq!(virtuals.name_of(address.into()), None);
    }

    #[test]
    fn a_restart_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("virtual-addresses.json");
        let before = VirtualAddresses::open(&file, at(0));
        // Not where its hash would put it: only the file can tell.
        let moved = Ipv4Addr::new(240, 1, 2, 3);
        before.table().insert(name("moved"), Allocation { address: moved, gone: None });
        let gone = before.address_of(&name("gone"), at(0)).unwrap();
        before.follow(&directory(&["moved"]), at(1));
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        let after = VirtualAddresses::open(&file, at(2));
        assert_eq!(after.address_of(&name("moved"), at(2)), Some(moved));
        after.follow(&directory(&["moved"]), at(24));
        assert_eq!(after.name_of(gone.into()), Some(name("gone")));
        after.follow(&directory(&["moved"]), at(25));
        assert_eq!(after.name_of(gone.into()), None);
    }

    #[test]
    fn a_state_file_is_not_believed_blindly() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("virtual-addresses.json");
        let entry = r#"{"name":"a","address":"240.0.0.5"}"#;
        for (text, reason) in [
            ("", "EOF"),
            ("{}", "missing field"),
            (r#"{"version":2,"addresses":[]}"#, "version 2"),
            (r#"{"version":1,"addresses":[],"more":1}"#, "unknown field"),
            (r#"{"version":1,"addresses":[{"name":"A","address":"240.0.0.5"}]}"#, "not a service name"),
            (r#"{"version":1,"addresses":[{"name":"a","address":"10.0.0.5"}]}"#, "out of range"),
            (r#"{"version":1,"addresses":[{"name":"a","address":"255.255.255.255"}]}"#, "out of range"),
            (&format!(r#"{{"version":1,"addresses":[{entry},{entry}]}}"#), "doubled"),
        ] {
            fs::write(&file, text).unwrap();
            let refused = load(&file, at(0)).expect_err(text);
            assert!(refused.contains(reason), "{text}: {refused}");
            assert!(VirtualAddresses::open(&file, at(0)).address_of(&name("a"), at(0)).is_some());
        }
        fs::write(&file, format!(r#"{{"version":1,"addresses":[{entry}]}}"#)).unwrap();
        assert!(load(&file, at(0)).is_ok());
        assert!(load(folder.path(), at(0)).unwrap_err().contains("regular"));
        File::create(&file).unwrap().set_len(MAX_FILE_BYTES + 1).unwrap();
        assert!(load(&file, at(0)).unwrap_err().contains("longer"));
        // A date in the future counts as now.
        let future =
            r#"{"version":1,"addresses":[{"name":"a","address":"240.0.0.5","gone":18446744073709551615}]}"#;
        fs::write(&file, future).unwrap();
        let mut table = load(&file, at(0)).unwrap();
        table.follow(|_| false, at(24));
        assert!(table.by_name.is_empty());
    }
}
