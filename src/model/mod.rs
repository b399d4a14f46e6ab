//! Model folders: configuration, checkpoint names, weights, export.

pub mod config;
