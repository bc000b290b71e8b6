//! Edits of YAML that keep every byte they do not touch: comments, quotes, order, indentation. A JSON Patch operation is
//! one insertion, removal or replacement of text; where it goes is read from the positions of the parser's events.
//!
//! New text is in block style, or JSON where it stands inside `{}` or `[]`. Aliases are followed by nobody: an operation
//! below one is an error, as the edit would change the anchor's other uses.

use granit_parser::{Event, Parser, ScalarStyle, Span, StructureStyle};
use json_patch::{Patch, PatchOperation};
use serde_json::Value;

/// A node and where it stands in the text, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Node {
    start: usize,
    end: usize,
    kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    /// A scalar, or nothing.
    Scalar,
    Alias,
    Sequence {
        flow: bool,
        items: Vec<Node>,
    },
    Mapping {
        flow: bool,
        entries: Vec<Entry>,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    key: String,
    start: usize,
    key_end: usize,
    value: Node,
}

/// One replacement of text.
#[derive(Debug, PartialEq, Eq)]
struct Edit {
    from: usize,
    to: usize,
    text: String,
}

/// Applies a patch to one document.
///
/// # Errors
/// The text is no YAML, or has nothing where an operation should act. The message names the operation's path.
pub fn apply(document: &str, patch: &Patch) -> Result<String, String> {
    let mut text = document.to_owned();
    for operation in &patch.0 {
        let root = parse(&text)?;
        let edit = edit(&text, &root, operation).ok_or_else(|| {
            format!("{}: this part of the document cannot be edited; write it out plainly", operation.path())
        })?;
        text.replace_range(edit.from..edit.to, &edit.text);
    }
    Ok(text)
}

fn parse(text: &str) -> Result<Node, String> {
    let mut events = Vec::new();
    for event in Parser::new_from_str(text) {
        let (event, span) = event.map_err(|error| error.to_string())?;
        let node = !matches!(
            event,
            Event::StreamStart
                | Event::StreamEnd
                | Event::DocumentStart(..)
                | Event::DocumentEnd
                | Event::Comment(..)
        );
        if node {
            events.push((event, span));
        }
    }
    let mut at = 0;
    node(text, &events, &mut at).ok_or_else(|| "the document is empty".into())
}

/// The node that begins at an event, and all below it.
fn node(text: &str, events: &[(Event<'_>, Span)], at: &mut usize) -> Option<Node> {
    let (event, span) = events.get(*at)?;
    *at += 1;
    let (start, end) = (span.start.byte_offset()?, span.end.byte_offset()?);
    match event {
        Event::Alias(_) => Some(Node { start, end, kind: Kind::Alias }),
        Event::Scalar(_, style, ..) => {
            let body = text.get(start..end)?;
            // Empty lines at the end of a block may be part of its text.
            let body = match style {
                ScalarStyle::Literal | ScalarStyle::Folded => body.strip_suffix('\n').unwrap_or(body),
                _ => body.trim_end(),
            };
            let end = start + body.len();
            Some(Node { start, end, kind: Kind::Scalar })
        }
        Event::SequenceStart(style, ..) => {
            let flow = *style == StructureStyle::Flow;
            let mut items = Vec::new();
            while !matches!(events.get(*at)?.0, Event::SequenceEnd) {
                items.push(node(text, events, at)?);
            }
            let end = closed(events, at, flow, items.last().map(|item| item.end), start)?;
            Some(Node { start, end, kind: Kind::Sequence { flow, items } })
        }
        Event::MappingStart(style, ..) => {
            let flow = *style == StructureStyle::Flow;
            let mut entries = Vec::new();
            while !matches!(events.get(*at)?.0, Event::MappingEnd) {
                entries.push(entry(text, events, at)?);
            }
            let end = closed(events, at, flow, entries.last().map(|entry| entry.value.end), start)?;
            let start = if flow { start } else { entries.first().map_or(start, |entry| entry.start) };
            Some(Node { start, end, kind: Kind::Mapping { flow, entries } })
        }
        _ => None,
    }
}

fn entry(text: &str, events: &[(Event<'_>, Span)], at: &mut usize) -> Option<Entry> {
    let name = match &events.get(*at)?.0 {
        Event::Scalar(name, ..) => name.to_string(),
        _ => String::new(),
    };
    let key = node(text, events, at)?;
    let mut value = node(text, events, at)?;
    // An empty value has no place of its own: it stands behind the colon.
    if value.kind == Kind::Scalar && value.start == value.end {
        let colon = key.end + text.get(key.end..)?.find(':')? + 1;
        (value.start, value.end) = (colon, colon);
    }
    Some(Entry { key: name, start: key.start, key_end: key.end, value })
}

/// The end of a collection: of its bracket, or of its last part.
fn closed(
    events: &[(Event<'_>, Span)],
    at: &mut usize,
    flow: bool,
    last: Option<usize>,
    start: usize,
) -> Option<usize> {
    let (_, span) = events.get(*at)?;
    *at += 1;
    if flow { span.end.byte_offset() } else { Some(last.unwrap_or(start)) }
}

fn edit(text: &str, root: &Node, operation: &PatchOperation) -> Option<Edit> {
    let path: Vec<String> = operation.path().tokens().map(|token| token.decoded().into_owned()).collect();
    let (last, parents) = path.split_last()?;
    let parent = parents.iter().try_fold(root, |node, key| child(node, key))?;
    match operation {
        PatchOperation::Add(add) => match &parent.kind {
            Kind::Mapping { .. } => add_key(text, parent, last, &add.value),
            Kind::Sequence { .. } => add_item(text, parent, last.parse().ok()?, &add.value),
            _ => None,
        },
        PatchOperation::Remove(_) => match &parent.kind {
            Kind::Mapping { .. } => remove_key(text, parent, last),
            Kind::Sequence { .. } => remove_item(text, parent, last.parse().ok()?),
            _ => None,
        },
        PatchOperation::Replace(replace) => replaced(text, parent, last, &replace.value),
        _ => None,
    }
}

fn child<'a>(node: &'a Node, key: &str) -> Option<&'a Node> {
    match &node.kind {
        Kind::Mapping { entries, .. } => {
            entries.iter().find(|entry| entry.key == key).map(|entry| &entry.value)
        }
        Kind::Sequence { items, .. } => items.get(key.parse::<usize>().ok()?),
        _ => None,
    }
}

fn add_key(text: &str, parent: &Node, key: &str, value: &Value) -> Option<Edit> {
    let Kind::Mapping { flow, entries } = &parent.kind else { return None };
    if *flow {
        let pair = format!("{}: {value}", Value::from(key));
        return Some(into_brackets(text, parent, entries.last().map(|entry| entry.value.end), &pair));
    }
    let column = column(text, entries.first()?.start);
    let line = entry_text(key, value, column);
    Some(insertion(line_end(text, parent.end), format!("\n{}{line}", " ".repeat(column))))
}

fn add_item(text: &str, parent: &Node, index: usize, value: &Value) -> Option<Edit> {
    let Kind::Sequence { flow, items } = &parent.kind else { return None };
    if *flow {
        if index >= items.len() {
            return Some(into_brackets(text, parent, items.last().map(|item| item.end), &value.to_string()));
        }
        return Some(insertion(items[index].start, format!("{value}, ")));
    }
    let column = column(text, dash(text, items.first()?));
    let item = format!("{}- {}", " ".repeat(column), block(value, column + 2));
    match items.get(index) {
        Some(next) => Some(insertion(above_comments(text, line_start(text, dash(text, next))), item + "\n")),
        None => Some(insertion(line_end(text, parent.end), format!("\n{item}"))),
    }
}

fn remove_key(text: &str, parent: &Node, key: &str) -> Option<Edit> {
    let Kind::Mapping { flow, entries } = &parent.kind else { return None };
    let index = entries.iter().position(|entry| entry.key == key)?;
    let entry = &entries[index];
    if *flow {
        let spans: Vec<_> = entries.iter().map(|entry| (entry.start, entry.value.end)).collect();
        return Some(out_of_brackets(&spans, index));
    }
    let indented = text[line_start(text, entry.start)..entry.start].trim().is_empty();
    match entries.get(index + 1) {
        // The first entry of an item stands beside its dash: the next one moves there.
        Some(next) if !indented => Some(removal(entry.start, next.start)),
        _ if entries.len() == 1 => Some(Edit { from: parent.start, to: parent.end, text: "{}".to_owned() }),
        _ => Some(lines(text, line_start(text, entry.start), entry.value.end)),
    }
}

fn remove_item(text: &str, parent: &Node, index: usize) -> Option<Edit> {
    let Kind::Sequence { flow, items } = &parent.kind else { return None };
    let item = items.get(index)?;
    if *flow {
        let spans: Vec<_> = items.iter().map(|item| (item.start, item.end)).collect();
        return Some(out_of_brackets(&spans, index));
    }
    Some(lines(text, line_start(text, dash(text, item)), item.end))
}

fn replaced(text: &str, parent: &Node, key: &str, value: &Value) -> Option<Edit> {
    let old = child(parent, key)?;
    if old.kind == Kind::Alias {
        return None;
    }
    let (flow, entry) = match &parent.kind {
        Kind::Mapping { flow, entries } => (*flow, entries.iter().find(|entry| entry.key == key)),
        Kind::Sequence { flow, .. } => (*flow, None),
        _ => return None,
    };
    let simple = !value.is_object() && !value.is_array();
    match entry {
        _ if flow => Some(Edit { from: old.start, to: old.end, text: value.to_string() }),
        Some(entry) if simple => {
            let colon = entry.key_end + text[entry.key_end..].find(':')? + 1;
            Some(Edit { from: colon, to: old.end, text: format!(" {}", block(value, 0)) })
        }
        Some(entry) => {
            let colon = entry.key_end + text[entry.key_end..].find(':')? + 1;
            let column = column(text, entry.start) + 2;
            let body = format!("\n{}{}", " ".repeat(column), block(value, column));
            Some(Edit { from: colon, to: old.end.max(colon), text: body })
        }
        None => Some(Edit { from: old.start, to: old.end, text: block(value, column(text, old.start)) }),
    }
}

/// `key: value` or `key:` and a block below it.
fn entry_text(key: &str, value: &Value, column: usize) -> String {
    let key = block(&Value::from(key), 0);
    match value {
        Value::Object(map) if !map.is_empty() => {
            format!("{key}:\n{}{}", " ".repeat(column + 2), block(value, column + 2))
        }
        Value::Array(items) if !items.is_empty() => {
            format!("{key}:\n{}{}", " ".repeat(column), block(value, column))
        }
        _ => format!("{key}: {}", block(value, 0)),
    }
}

/// A value in block style whose first line stands at a column already.
fn block(value: &Value, column: usize) -> String {
    let indent = " ".repeat(column);
    match value {
        Value::Object(map) if !map.is_empty() => map
            .iter()
            .map(|(key, value)| entry_text(key, value, column))
            .collect::<Vec<_>>()
            .join(&format!("\n{indent}")),
        Value::Array(items) if !items.is_empty() => items
            .iter()
            .map(|item| format!("- {}", block(item, column + 2)))
            .collect::<Vec<_>>()
            .join(&format!("\n{indent}")),
        Value::String(text) if is_plain(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Text that needs no quotes and means no number, truth or nothing.
fn is_plain(text: &str) -> bool {
    let begins = text.starts_with(|character: char| character.is_ascii_alphabetic() || character == '/');
    let plain = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_./".contains(&byte));
    const WORDS: [&str; 9] = ["true", "false", "yes", "no", "on", "off", "null", "y", "n"];
    begins && plain && !WORDS.contains(&text.to_ascii_lowercase().as_str())
}

fn into_brackets(text: &str, parent: &Node, last: Option<usize>, item: &str) -> Edit {
    match last {
        Some(end) => insertion(end, format!(", {item}")),
        None => {
            let inside = parent.start + text[parent.start..].find(['{', '[']).map_or(0, |at| at + 1);
            insertion(inside, item.to_owned())
        }
    }
}

/// Takes one part out of brackets, with the comma behind it or before it.
fn out_of_brackets(spans: &[(usize, usize)], index: usize) -> Edit {
    let (start, end) = spans[index];
    match (index.checked_sub(1), spans.get(index + 1)) {
        (_, Some(next)) => removal(start, next.0),
        (Some(before), None) => removal(spans[before].1, end),
        (None, None) => removal(start, end),
    }
}

fn insertion(at: usize, text: String) -> Edit {
    Edit { from: at, to: at, text }
}

fn removal(from: usize, to: usize) -> Edit {
    Edit { from, to, text: String::new() }
}

/// Whole lines from a line's start to the end of the line of another place.
fn lines(text: &str, from: usize, end: usize) -> Edit {
    let to = line_end(text, end);
    if to < text.len() { removal(from, to + 1) } else { removal(from.saturating_sub(1), to) }
}

fn line_start(text: &str, at: usize) -> usize {
    text[..at].rfind('\n').map_or(0, |newline| newline + 1)
}

/// The end of the line, before its line break.
fn line_end(text: &str, at: usize) -> usize {
    let end = text[at..].find('\n').map_or(text.len(), |newline| at + newline);
    if text[..end].ends_with('\r') { end - 1 } else { end }
}

/// In characters; indentation has no others than spaces.
fn column(text: &str, at: usize) -> usize {
    text[line_start(text, at)..at].chars().count()
}

/// The dash of a block item: the last one before it with nothing but dashes and spaces before it in its line. What may stand
/// between the two are an anchor, a tag, a comment.
fn dash(text: &str, item: &Node) -> usize {
    let dashes = text[..item.start].rmatch_indices('-').map(|(at, _)| at);
    let mut begins = dashes.filter(|at| {
        let before = &text[line_start(text, *at)..*at];
        before.bytes().all(|byte| matches!(byte, b' ' | b'-'))
            && text[at + 1..].starts_with([' ', '\n', '\r'])
    });
    begins.next().unwrap_or(item.start)
}

/// The start of the comment lines directly above a line.
fn above_comments(text: &str, mut start: usize) -> usize {
    while start > 0 {
        let above = line_start(text, start - 1);
        if !text[above..start].trim_start().starts_with('#') {
            break;
        }
        start = above;
    }
    start
}

#[cfg(test)]
mod tests;
