//! Batches of the workload `finetune`: queries and passages in a new order with new tokens, ready for a bi-encoder.

use std::sync::Arc;

use crate::data::pairs::batch::{ContrastiveBatch, member_name};
use crate::data::pairs::texts::{TextBatch, TextRules, Texts};
use crate::error::Result;
use crate::rng::{Permutation, Site};
use crate::train::biencoder::Room;

use super::workload::{Model, Workload, texts};

/// `count` batches, and the room that holds each of them.
///
/// # Errors
/// Never, unless the list of lengths is broken.
pub fn batches(model: &Model, count: u64) -> Result<(Vec<ContrastiveBatch>, Room)> {
    let [queries, passages] = Workload::Finetune.lengths(model)?;
    let longest = [&queries, &passages].map(|lengths| lengths.iter().copied().max().unwrap_or(0));
    let words = model.config().vocab_size;
    let group = passages.len() / queries.len();
    let members = 0..passages.len() as u32;
    let batch = |batch: u64| {
        // Names of the texts' dropout: no two batches share a sample.
        let sample = |query: usize| batch * queries.len() as u64 + query as u64;
        let passage = |i: usize| member_name(sample(i / group), 1 + i % group);
        Ok(ContrastiveBatch {
            queries: side(words, (1, batch), &queries, |i| member_name(sample(i), 0))?,
            passages: side(words, (2, batch), &passages, passage)?,
            group,
            across: None,
            targets: members.clone().step_by(group).collect(),
            hidden: None,
            teacher: None,
            rows: (0..queries.len() as u32).collect(),
            members: members.clone().collect(),
        })
    };
    let room = Room { queries: queries.len(), passages: passages.len(), lengths: longest, chunk: None };
    Ok(((0..count).map(batch).collect::<Result<_>>()?, room))
}

/// Random texts of these lengths in random order under their names.
fn side(words: usize, (seed, batch): (u64, u64), lengths: &[usize], name: impl Fn(usize) -> u64) -> Result<TextBatch> {
    let order = Permutation::new(seed, batch, Site::Order, lengths.len() as u64);
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let texts = Texts::new(Arc::new(texts(words, seed, batch, lengths)), TextRules::new(longest))?;
    let chosen: Vec<(u64, u32)> = (0..lengths.len()).map(|i| (name(i), order.at(i as u64) as u32)).collect();
    texts.pack(&chosen)
}
