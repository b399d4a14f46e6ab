//! Ranks of one run: what they do together, and what becomes of all when one fails.

#[path = "collective/operations.rs"]
mod operations;
#[path = "collective/rendezvous.rs"]
mod rendezvous;
#[path = "collective/support.rs"]
mod support;
