//! Encoding, searching, mining, evaluating: what comes out, what is refused, what survives being killed.

#[path = "retrieve/support.rs"]
mod support;

#[path = "retrieve/bad_input.rs"]
mod bad_input;
#[path = "retrieve/commands.rs"]
mod commands;
#[path = "retrieve/encode.rs"]
mod encode;
#[path = "retrieve/interrupted.rs"]
mod interrupted;
#[path = "retrieve/lexical.rs"]
mod lexical;
#[path = "retrieve/mine.rs"]
mod mine;
#[path = "retrieve/search.rs"]
mod search;
