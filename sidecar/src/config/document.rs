//! Reads a YAML document key by key and collects every mistake with its line, instead of ending at the first.
//! What a document may hold stands in the code that asks for it: a key that nobody asked for is unknown and
//! refused. YAML 1.2 scalars; no anchors, no merge keys, one document a file, 32 levels.

use std::{
    fmt,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};
use serde_saphyr::{Spanned, options::DuplicateKeyPolicy, options::MergeKeyPolicy};

use crate::model::Protocol;

/// Something wrong in a file that somebody wrote: the place, the thing, and what was expected.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mistake {
    /// The file.
    pub file: PathBuf,
    /// The line, counted from 1; none where the whole file is meant.
    pub line: Option<u64>,
    /// For example `` `retries.attempts` is -1; expected a whole number from 0 to 10 ``.
    pub text: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}: {}", self.file.display(), self.text),
            None => write!(f, "{}: {}", self.file.display(), self.text),
        }
    }
}

/// The mistakes of one file. Bounded: after [`MAX_MISTAKES`] no more are kept.
#[derive(Debug)]
pub struct Mistakes {
    file: PathBuf,
    found: Vec<Mistake>,
}

/// A person mends no more at a time.
pub const MAX_MISTAKES: usize = 50;

impl Mistakes {
    /// None yet, in this file.
    pub fn new(file: &Path) -> Self {
        Mistakes { file: file.to_owned(), found: Vec::new() }
    }

    /// Adds one.
    pub fn add(&mut self, line: Option<u64>, text: impl Into<String>) {
        if self.found.len() < MAX_MISTAKES {
            self.found.push(Mistake { file: self.file.clone(), line, text: text.into() });
        }
    }

    /// The value, if there was no mistake on the way; else all of them in the order of their lines.
    pub fn or_else<T>(mut self, value: T) -> Result<T, Vec<Mistake>> {
        self.found.sort();
        if self.found.is_empty() { Ok(value) } else { Err(self.found) }
    }
}

/// Parses a document whose top is a section. None after a mistake: nothing can be read then.
pub fn parse(text: &str, mistakes: &mut Mistakes) -> Option<Section> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! { max_depth: 32, max_aliases: 0 },
        duplicate_keys: DuplicateKeyPolicy::Error,
        merge_keys: MergeKeyPolicy::Error,
        strict_booleans: true,
        with_snippet: false,
    };
    match serde_saphyr::from_str_with_options::<Spanned<Value>>(text, options) {
        Ok(root) => Item::new(String::new(), root).section(mistakes),
        Err(error) => {
            let line = error.location().map(|place| place.line()).filter(|line| *line > 0);
            mistakes.add(line, error.render_with_formatter(&serde_saphyr::UserMessageFormatter));
            None
        }
    }
}

/// The entries below one key. Every key asked for is known; [`Section::finish`] refuses the others.
#[derive(Debug)]
pub struct Section {
    path: String,
    line: u64,
    entries: Vec<(Spanned<String>, Spanned<Value>)>,
    known: Vec<&'static str>,
}

impl Section {
    /// The line where it begins.
    pub fn line(&self) -> u64 {
        self.line
    }

    /// The value of a key; none where it is absent or empty.
    pub fn take(&mut self, key: &'static str) -> Option<Item> {
        self.known.push(key);
        let at = self.entries.iter().position(|(name, _)| name.value == key)?;
        let (_, value) = self.entries.swap_remove(at);
        (value.value != Value::Null).then(|| Item::new(below(&self.path, key), value))
    }

    /// The value of a key that must be there.
    pub fn need(&mut self, key: &'static str, mistakes: &mut Mistakes) -> Option<Item> {
        let item = self.take(key);
        if item.is_none() {
            mistakes.add(Some(self.line), format!("`{}` is missing", below(&self.path, key)));
        }
        item
    }

    /// Refuses every key that was not asked for.
    pub fn finish(mut self, mistakes: &mut Mistakes) {
        self.known.sort_unstable();
        for (key, _) in &self.entries {
            if self.known.contains(&key.value.as_str()) {
                continue;
            }
            mistakes.add(
                Some(key.referenced.line()),
                format!(
                    "`{}` is an unknown key; expected {}",
                    shown(&below(&self.path, &key.value)),
                    self.known.join(", ")
                ),
            );
        }
    }
}

/// One value with its place.
#[derive(Debug)]
pub struct Item {
    path: String,
    line: u64,
    value: Value,
}

impl Item {
    fn new(path: String, value: Spanned<Value>) -> Self {
        Item { path, line: value.referenced.line(), value: value.value }
    }

    /// The line where it stands.
    pub fn line(&self) -> u64 {
        self.line
    }

    /// Notes that this value is wrong, and what was expected.
    pub fn refuse(&self, expected: impl fmt::Display, mistakes: &mut Mistakes) {
        let named = if self.path.is_empty() { "the document".to_owned() } else { format!("`{}`", self.path) };
        mistakes.add(Some(self.line), format!("{named} is {}; expected {expected}", self.value));
    }

    /// A text that parses as `T`.
    pub fn parsed<T: FromStr>(&self, expected: &str, mistakes: &mut Mistakes) -> Option<T> {
        let parsed = self.text().and_then(|text| text.parse().ok());
        if parsed.is_none() {
            self.refuse(expected, mistakes);
        }
        parsed
    }

    /// One of the words; gives its place in the list.
    pub fn word(&self, words: &[&str], mistakes: &mut Mistakes) -> Option<usize> {
        let place = self.text().and_then(|text| words.iter().position(|word| *word == text));
        if place.is_none() {
            self.refuse(words.join(", "), mistakes);
        }
        place
    }

    /// A protocol by one of its names in configuration.
    pub fn protocol(&self, mistakes: &mut Mistakes) -> Option<Protocol> {
        let words = PROTOCOLS.map(|(word, _)| word);
        self.word(&words, mistakes).map(|place| PROTOCOLS[place].1)
    }

    /// A whole number within the range.
    pub fn number(&self, range: RangeInclusive<u64>, mistakes: &mut Mistakes) -> Option<u64> {
        match self.value {
            Value::Integer(number) if u64::try_from(number).is_ok_and(|number| range.contains(&number)) => {
                u64::try_from(number).ok()
            }
            _ => {
                let expected = format!("a whole number from {} to {}", range.start(), range.end());
                self.refuse(expected, mistakes);
                None
            }
        }
    }

    /// A duration within the range, as humantime writes it.
    pub fn duration(&self, range: RangeInclusive<Duration>, mistakes: &mut Mistakes) -> Option<Duration> {
        let parsed = self.text().and_then(|text| humantime::parse_duration(text).ok());
        let within = parsed.filter(|duration| range.contains(duration));
        if within.is_none() {
            let (from, to) =
                (humantime::format_duration(*range.start()), humantime::format_duration(*range.end()));
            self.refuse(format!("a duration from {from} to {to}, for example 1s or 250ms"), mistakes);
        }
        within
    }

    /// The members of a list of at most `most`.
    pub fn list(self, most: usize, mistakes: &mut Mistakes) -> Vec<Item> {
        match self.value {
            Value::List(members) if members.len() <= most => members
                .into_iter()
                .enumerate()
                .map(|(at, member)| Item::new(format!("{}[{at}]", self.path), member))
                .collect(),
            _ => {
                self.refuse(format!("a list of at most {most}"), mistakes);
                Vec::new()
            }
        }
    }

    /// The entries of a section.
    pub fn section(self, mistakes: &mut Mistakes) -> Option<Section> {
        match self.value {
            Value::Section(entries) => {
                Some(Section { path: self.path, line: self.line, entries, known: Vec::new() })
            }
            _ => {
                self.refuse("a section of keys and values", mistakes);
                None
            }
        }
    }

    fn text(&self) -> Option<&str> {
        match &self.value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }
}

/// What is expected where a service is named.
pub const EXPECTED_NAME: &str = "`name` or `name_namespace`, each of at most 63 of a-z 0-9 -";
/// What is expected where an identity is named.
pub const EXPECTED_IDENTITY: &str = "an identity such as spiffe://weft.local/ns/shop/sa/orders";

const PROTOCOLS: [(&str, Protocol); 5] = [
    ("http1", Protocol::Http1),
    ("http2", Protocol::Http2),
    ("grpc", Protocol::Http2),
    ("tls", Protocol::Tls),
    ("tcp", Protocol::Opaque),
];

fn below(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

/// At most this many characters of a value are repeated in a message.
const SHOWN: usize = 100;

/// A piece of a foreign text for a message: short, and without control characters.
fn shown(text: &str) -> String {
    let short: String = text.chars().take(SHOWN).collect();
    let dots = if short.len() < text.len() { "…" } else { "" };
    format!("{}{dots}", short.escape_debug())
}

#[derive(Debug, PartialEq)]
enum Value {
    Null,
    Bool(bool),
    Integer(i64),
    Float(f64),
    Text(String),
    List(Vec<Spanned<Value>>),
    Section(Vec<(Spanned<String>, Spanned<Value>)>),
}

/// As it is repeated in a message.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Null => f.write_str("empty"),
            Value::Bool(value) => write!(f, "{value}"),
            Value::Integer(value) => write!(f, "{value}"),
            Value::Float(value) => write!(f, "{value}"),
            Value::Text(text) => write!(f, "\"{}\"", shown(text)),
            Value::List(members) => write!(f, "a list of {}", members.len()),
            Value::Section(_) => f.write_str("a section"),
        }
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyValue)
    }
}

struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Integer(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Integer(i64::try_from(value).unwrap_or(i64::MAX)))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value))
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(Value::Text(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut members = Vec::new();
        while let Some(member) = list.next_element()? {
            members.push(member);
        }
        Ok(Value::List(members))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut section: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = section.next_entry()? {
            entries.push(entry);
        }
        Ok(Value::Section(entries))
    }
}

#[cfg(test)]
mod tests;
