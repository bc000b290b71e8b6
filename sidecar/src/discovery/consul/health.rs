//! The answer to `/v1/health/service/NAME`, read into types of the model. Pure, and believes nothing: an answer that is no
//! list is refused as a whole; an entry of another shape, or an instance whose values cannot be used (no port, a name for
//! an address, an unknown protocol) is left out with a mistake that names it, and costs no other one ([`entry`]).

mod entry;

use std::{collections::HashSet, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{Error as _, SeqAccess, Visitor},
};
use serde_json::value::RawValue;
use weft_proto::spiffe::SpiffeId;

use super::error::{Error, Kind, printable, said};
use crate::model::ServiceName;
pub(super) use entry::{Instance, InstanceKey};
use entry::{Words, read_entry, stated_identities};

/// Instances of one service.
pub(super) const MAX_INSTANCES: usize = 20_000;
/// Mistakes that are kept of one answer.
const MAX_MISTAKES: usize = 20;

/// What one answer holds.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Reading {
    pub(super) instances: Vec<Instance>,
    /// Instances that are there and cannot be read.
    pub(super) unreadable: HashSet<InstanceKey>,
    /// The identities that they state.
    pub(super) identities: Vec<SpiffeId>,
    /// One of them states identities that cannot be read either.
    pub(super) is_identity_unreadable: bool,
    /// For the log; bounded.
    pub(super) mistakes: Vec<String>,
}

/// The entries of an answer as they came. Bounded, so that an answer of nothing but commas takes no memory.
struct Entries<'a>(Vec<&'a RawValue>);

impl<'de> Deserialize<'de> for Entries<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(EntriesVisitor)
    }
}

struct EntriesVisitor;

impl<'de> Visitor<'de> for EntriesVisitor {
    type Value = Entries<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a sequence of instances")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Entries<'de>, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = list.next_element()? {
            if entries.len() == MAX_INSTANCES {
                return Err(A::Error::custom(format!("more than {MAX_INSTANCES} instances; none is read")));
            }
            entries.push(entry);
        }
        Ok(Entries(entries))
    }
}

/// Reads the answer.
pub(super) fn read(name: &ServiceName, body: &[u8]) -> Result<Reading, Error> {
    let entries: Entries<'_> = match serde_json::from_slice(body) {
        Ok(entries) => entries,
        Err(_) => return Err(explain::<Entries<'_>>(&format!("service `{name}`"), body)),
    };
    let mut reading = Reading::default();
    let mut words = Words::default();
    for (at, entry) in entries.0.into_iter().enumerate() {
        match read_entry(name, entry.get(), &mut words) {
            Ok(instance) => reading.instances.push(instance),
            Err((key, mut why)) => {
                match stated_identities(entry.get()) {
                    Ok(identities) => reading.identities.extend(identities),
                    Err(of_identities) => {
                        reading.is_identity_unreadable = true;
                        if of_identities != why {
                            why = format!("{why}; {of_identities}");
                        }
                    }
                }
                if reading.mistakes.len() < MAX_MISTAKES {
                    let place = match &key {
                        Some((node, id)) => {
                            format!("instance `{}` on node `{}`", id.escape_debug(), node.escape_debug())
                        }
                        None => format!("entry {} of the answer", at + 1),
                    };
                    reading.mistakes.push(format!("service `{name}`, {place}: {why}"));
                }
                reading.unreadable.insert(key.unwrap_or_else(|| (words.shared(""), words.shared(""))));
            }
        }
    }
    Ok(reading)
}

/// Why an answer cannot be read: the field, what was expected, and how it begins.
pub(super) fn explain<'a, T: Deserialize<'a>>(of: &str, body: &'a [u8]) -> Error {
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let why = match serde_path_to_error::deserialize::<_, T>(&mut deserializer) {
        Ok(_) => "something follows the answer".to_owned(),
        Err(error) => {
            let (path, inner) = (printable(&error.path().to_string()), error.inner());
            let place = if path == "." { String::new() } else { format!("`{path}`: ") };
            match inner.is_eof() {
                true => format!("{place}the answer ends too early, after {} bytes", body.len()),
                false => format!("{place}{}", printable(&inner.to_string())),
            }
        }
    };
    let begins: Vec<u8> = body.iter().copied().take(40).collect();
    Error::new(
        Kind::BadAnswer,
        format!("{of}: the answer cannot be read: {why} (it begins {})", said(&begins)),
    )
}

#[cfg(test)]
mod tests;
