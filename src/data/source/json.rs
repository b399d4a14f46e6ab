//! One JSON object as a document: the field names that corpora use, everything else skipped without being built.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};

use super::Document;

/// Names of the id, best first.
pub const ID: [&str; 5] = ["_id", "docid", "id", "doc_id", "pid"];
/// Names of the text, best first.
pub const TEXT: [&str; 5] = ["text", "contents", "document_text", "passage", "body"];
/// Name of the title.
pub const TITLE: &str = "title";

/// Reads one line. The error says what is wrong and where in the line.
pub fn parse(line: &str) -> Result<Document, String> {
    let found: Found = serde_json::from_str(line).map_err(|e| {
        // serde counts lines of its own input, which is one line.
        e.to_string().replace("at line 1 column", "at column")
    })?;
    let Some(text) = found.text.value else {
        return Err(no_text(found.names.iter().map(String::as_str)));
    };
    Ok(Document { id: found.id.value, title: found.title.filter(|t| !t.is_empty()), text })
}

/// The message about missing text; `names` are the fields that are there.
pub fn no_text<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.collect();
    let there = if names.is_empty() { "nothing else".into() } else { names.join(", ") };
    format!("no text: none of the fields {} (there is {there})", TEXT.join(", "))
}

/// The best field seen so far for one purpose.
struct Best<T> {
    rank: usize,
    value: Option<T>,
}

struct Found {
    id: Best<String>,
    text: Best<String>,
    title: Option<String>,
    /// Other fields, for the message; the first eight.
    names: Vec<String>,
}

impl<'de> Deserialize<'de> for Found {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_map(Object)
    }
}

struct Object;

impl<'de> Visitor<'de> for Object {
    type Value = Found;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("one JSON object a line")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Found, A::Error> {
        let none = |value| Best { rank: usize::MAX, value };
        let mut found = Found { id: none(None), text: none(None), title: None, names: Vec::new() };
        while let Some(Name(key)) = map.next_key()? {
            let rank = |names: &[&str]| names.iter().position(|n| *n == key);
            if let Some(rank) = rank(&TEXT) {
                if rank < found.text.rank {
                    let value: Option<String> = map.next_value().map_err(|e| named(&key, e))?;
                    found.text = Best { rank: if value.is_some() { rank } else { usize::MAX }, value };
                    continue;
                }
            } else if let Some(rank) = rank(&ID) {
                if rank < found.id.rank {
                    let Id(value) = map.next_value().map_err(|e| named(&key, e))?;
                    found.id = Best { rank: if value.is_some() { rank } else { usize::MAX }, value };
                    continue;
                }
            } else if key == TITLE {
                found.title = map.next_value().map_err(|e| named(&key, e))?;
                continue;
            } else if found.names.len() < 8 {
                found.names.push(key.into_owned());
            }
            map.next_value::<IgnoredAny>()?;
        }
        Ok(found)
    }
}

fn named<E: serde::de::Error>(key: &str, e: E) -> E {
    E::custom(format!("field {key}: {e}"))
}

/// A key, borrowed where it holds no escape.
struct Name<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for Name<'de> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl<'de> Visitor<'de> for V {
            type Value = Name<'de>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a field name")
            }

            fn visit_borrowed_str<E>(self, v: &'de str) -> Result<Self::Value, E> {
                Ok(Name(Cow::Borrowed(v)))
            }

            fn visit_str<E>(self, v: &str) -> Result<Self::Value, E> {
                Ok(Name(Cow::Owned(v.to_owned())))
            }
        }
        d.deserialize_str(V)
    }
}

/// An id: a string or a whole number.
struct Id(Option<String>);

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct V;
        impl Visitor<'_> for V {
            type Value = Id;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string or a whole number")
            }

            fn visit_str<E: serde::de::Error>(self, v: &str) -> Result<Id, E> {
                if v.is_empty() {
                    return Err(E::custom("the id is empty"));
                }
                Ok(Id(Some(v.to_owned())))
            }

            fn visit_u64<E>(self, v: u64) -> Result<Id, E> {
                Ok(Id(Some(v.to_string())))
            }

            fn visit_i64<E>(self, v: i64) -> Result<Id, E> {
                Ok(Id(Some(v.to_string())))
            }

            fn visit_unit<E>(self) -> Result<Id, E> {
                Ok(Id(None))
            }
        }
        d.deserialize_any(V)
    }
}
