//! Packed batches of fine-tuning: queries and passages apart for a bi-encoder, together for a cross-encoder.

use std::ops::Range;
use std::sync::Arc;

use clap::ValueEnum;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::data::corpus::Corpus;
use crate::data::loader::{Ahead, Loader};
use crate::data::order::Part;
use crate::error::{Error, Result};

use super::Pairs;
use super::groups::{Group, Groups};
use super::texts::{Scratch, TextBatch, TextRules, Texts, pack};

/// What happens to passages of a batch that would be wrong negatives of a query.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Duplicates {
    /// They are no candidates of that query.
    #[default]
    Mask,
    /// They stay, as in the published code.
    Keep,
}

/// One batch of a bi-encoder. B queries, `P = B · group` passages.
#[derive(Clone, Debug, PartialEq)]
pub struct ContrastiveBatch {
    /// The queries.
    pub queries: TextBatch,
    /// The passages: those of the first query, of the second, …; of each its positive first.
    pub passages: TextBatch,
    /// Passages of a query.
    pub group: usize,
    /// The passages of all ranks, where they are candidates, too. Then P and the numbers of passages below are of all.
    pub across: Option<Across>,
    /// `[B]` index of each query's own positive among the passages.
    pub targets: Vec<u32>,
    /// `[B, ⌈P / 32⌉]` bit `p % 32` of word `p / 32` of row b: passage p is no candidate of query b, since it is another of its
    /// positives or has the same text as one. Never set for the target. `None` where no bit is.
    pub hidden: Option<Vec<u32>>,
    /// `[B, group]` the teacher's scores.
    pub teacher: Option<Vec<f32>>,
    /// `[B]` rows of the queries in [`Pairs`], for messages.
    pub rows: Vec<u32>,
    /// `[B, group]` numbers of the passages' texts, for messages.
    pub members: Vec<u32>,
}

/// A batch's passages among those of all ranks, which follow each other in the order of the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Across {
    /// Passages of all ranks.
    pub passages: usize,
}

/// One batch of a cross-encoder: B queries, each with the passages of its group.
#[derive(Clone, Debug, PartialEq)]
pub struct CrossBatch {
    /// `[B · group]` sequences `[CLS] query [SEP] passage [SEP]`; of each query its positive first.
    pub pairs: TextBatch,
    /// Passages of a query.
    pub group: usize,
    /// `[B, group]` the teacher's scores.
    pub teacher: Option<Vec<f32>>,
    /// `[B]` rows of the queries in [`Pairs`], for messages.
    pub rows: Vec<u32>,
    /// `[B, group]` numbers of the passages' texts, for messages.
    pub members: Vec<u32>,
}

/// The name of a member of a sample: its dropout belongs to it.
pub fn member_name(sample: u64, member: usize) -> u64 {
    sample << 16 | member as u64
}

/// Builds [`ContrastiveBatch`]es. The result depends on nothing but the samples.
#[derive(Clone)]
pub struct ContrastiveBuilder {
    groups: Groups,
    queries: Arc<Texts>,
    passages: Arc<Texts>,
    duplicates: Duplicates,
    across: bool,
}

impl ContrastiveBuilder {
    /// Queries and passages as the model gets them.
    pub fn texts(&self) -> [&Texts; 2] {
        [&self.queries, &self.passages]
    }

    /// A builder for the samples of `pairs` under `seed`.
    pub fn new(
        seed: u64,
        pairs: Arc<Pairs>,
        queries: TextRules,
        passages: TextRules,
        duplicates: Duplicates,
    ) -> Result<Self> {
        let queries = Arc::new(Texts::new(pairs.queries().corpus.clone(), queries)?);
        let passages = Arc::new(Texts::new(pairs.passages().corpus.clone(), passages)?);
        let groups = Groups::new(seed, pairs, passages.clone())?;
        Ok(ContrastiveBuilder { groups, queries, passages, duplicates, across: false })
    }

    /// What the samples are.
    pub fn groups(&self) -> &Groups {
        &self.groups
    }

    /// The same with `queries` of them held out for evaluation.
    pub fn hold_out(mut self, queries: u64) -> Result<Self> {
        self.groups.hold_out(queries).map(|()| self)
    }

    /// The same whose batches of training have the passages of all ranks as candidates.
    pub fn across(self, across: bool) -> Self {
        ContrastiveBuilder { across, ..self }
    }

    /// The batch of these samples of training, in their order.
    pub fn build(&self, samples: Range<u64>) -> Result<ContrastiveBatch> {
        self.build_of(Part::Train, samples)
    }

    /// The batch of these samples of a part, in their order.
    pub fn build_of(&self, part: Part, samples: Range<u64>) -> Result<ContrastiveBatch> {
        self.build_among(part, samples.clone(), samples)
    }

    /// The batch of these samples of a part with the passages of `all` as candidates, among which the samples are.
    fn build_among(&self, part: Part, samples: Range<u64>, all: Range<u64>) -> Result<ContrastiveBatch> {
        let across = samples != all;
        let chosen = Chosen::of(&self.groups, part, samples.clone())?;
        let queries: Vec<(u64, u32)> =
            chosen.groups.iter().map(|(sample, g)| (member_name(*sample, 0), g.query)).collect();
        let queries = self.queries.pack(&queries)?;
        let passages: Vec<(u64, u32)> = chosen.members().map(|(name, _, passage)| (name, passage)).collect();
        let passages = self.passages.pack(&passages)?;
        let (group, members) = (chosen.size, chosen.passages());
        let first = (samples.start - all.start) as usize;
        let hidden = match self.duplicates {
            Duplicates::Mask if across => {
                self.hidden(&chosen, first, &Chosen::of(&self.groups, part, all.clone())?.passages())?
            }
            Duplicates::Mask => self.hidden(&chosen, first, &members)?,
            Duplicates::Keep => None,
        };
        Ok(ContrastiveBatch {
            across: None,
            targets: (0..chosen.groups.len()).map(|b| ((first + b) * group) as u32).collect(),
            hidden,
            teacher: chosen.teacher(),
            rows: chosen.rows(),
            queries,
            passages,
            group,
            members,
        })
    }

    /// The bits of passages that are no candidates. A positive of a query and any text equal to it have one hash, so that the
    /// hashes of the query's positives find all of them. `members` are all candidates, those of the chosen from group `before` on.
    fn hidden(&self, chosen: &Chosen, before: usize, members: &[u32]) -> Result<Option<Vec<u32>>> {
        let hash = |scratch: &mut Scratch, &passage: &u32| self.passages.hash_with(passage, scratch);
        let hashes: Vec<Result<u64>> = members.par_iter().map_init(Scratch::default, hash).collect();
        let mut places = Vec::with_capacity(members.len());
        for (place, hash) in hashes.into_iter().enumerate() {
            places.push((hash?, place));
        }
        places.sort_unstable();
        let (words, pairs) = (members.len().div_ceil(32), self.groups.pairs());
        let row_bits = |scratch: &mut Scratch, (b, (_, group)): (usize, &(u64, Group))| {
            let mut bits = vec![0u32; words];
            for &positive in pairs.positives(group.row as usize) {
                let hash = self.passages.hash_with(positive, scratch)?;
                let first = places.partition_point(|&(h, _)| h < hash);
                for &(_, place) in places[first..].iter().take_while(|&&(h, _)| h == hash) {
                    bits[place / 32] |= 1 << (place % 32);
                }
            }
            let target = (before + b) * chosen.size;
            bits[target / 32] &= !(1 << (target % 32));
            Ok(bits)
        };
        let rows: Vec<Result<Vec<u32>>> =
            chosen.groups.par_iter().enumerate().map_init(Scratch::default, row_bits).collect();
        let mut all = Vec::with_capacity(rows.len() * words);
        for row in rows {
            all.extend(row?);
        }
        Ok(all.iter().any(|&word| word != 0).then_some(all))
    }

    /// The batches of a plan's steps, built ahead.
    pub fn load(self, ahead: Ahead) -> Result<Loader<ContrastiveBatch>> {
        let (queries, part) = (self.groups.queries_for(&ahead)?, ahead.plan.part());
        Loader::build_ahead(queries, ahead, move |micro| match self.across {
            true => {
                let passages = (micro.round.end - micro.round.start) as usize * self.groups.pairs().settings().group;
                let batch = self.build_among(part, micro.neighbours(), micro.round.clone())?;
                Ok(ContrastiveBatch { across: Some(Across { passages }), ..batch })
            }
            false => self.build_of(part, micro.neighbours()),
        })
    }
}

/// Builds [`CrossBatch`]es. The result depends on nothing but the samples.
#[derive(Clone)]
pub struct CrossBuilder {
    groups: Groups,
    texts: Arc<PairTexts>,
}

impl CrossBuilder {
    /// Queries and passages as the model gets them.
    pub fn texts(&self) -> &PairTexts {
        &self.texts
    }

    /// A builder for the samples of `pairs` under `seed`; the other arguments are those of [`PairTexts::new`].
    pub fn new(seed: u64, pairs: Arc<Pairs>, query: TextRules, prefix: Vec<u32>, max_length: usize) -> Result<Self> {
        let (queries, passages) = (pairs.queries().corpus.clone(), pairs.passages().corpus.clone());
        let texts = Arc::new(PairTexts::new(queries, passages, query, prefix, max_length)?);
        let groups = Groups::new(seed, pairs, texts.passages.clone())?;
        Ok(CrossBuilder { groups, texts })
    }

    /// What the samples are.
    pub fn groups(&self) -> &Groups {
        &self.groups
    }

    /// The same with `queries` of them held out for evaluation.
    pub fn hold_out(mut self, queries: u64) -> Result<Self> {
        self.groups.hold_out(queries).map(|()| self)
    }

    /// The batch of these samples of training, in their order.
    pub fn build(&self, samples: Range<u64>) -> Result<CrossBatch> {
        self.build_of(Part::Train, samples)
    }

    /// The batch of these samples of a part, in their order.
    pub fn build_of(&self, part: Part, samples: Range<u64>) -> Result<CrossBatch> {
        let chosen = Chosen::of(&self.groups, part, samples)?;
        let pairs: Vec<(u64, u32, u32)> = chosen.members().collect();
        let pairs = self.texts.pack(&pairs)?;
        let (group, teacher) = (chosen.size, chosen.teacher());
        Ok(CrossBatch { pairs, group, teacher, rows: chosen.rows(), members: chosen.passages() })
    }

    /// The batches of a plan's steps, built ahead.
    pub fn load(self, ahead: Ahead) -> Result<Loader<CrossBatch>> {
        let (queries, part) = (self.groups.queries_for(&ahead)?, ahead.plan.part());
        Loader::build_ahead(queries, ahead, move |micro| self.build_of(part, micro.neighbours()))
    }
}

/// Queries and passages as a cross-encoder gets them: `[CLS] query [SEP] passage [SEP]`.
pub struct PairTexts {
    queries: Texts,
    passages: Arc<Texts>,
    max_length: usize,
}

impl PairTexts {
    /// A query is cut to `query.max_length` tokens, `[CLS]` and `[SEP]` included; then the passage alone, below `prefix`, so that the pair
    /// has at most `max_length`.
    pub fn new(
        queries: Arc<dyn Corpus>,
        passages: Arc<dyn Corpus>,
        query: TextRules,
        prefix: Vec<u32>,
        max_length: usize,
    ) -> Result<PairTexts> {
        let least = query.max_length + prefix.len() + 2;
        if max_length < least {
            let cause =
                format!("pairs of {max_length} tokens do not hold a query of {} and a passage", query.max_length);
            return Err(Error::usage(cause).remedy(format!("raise the length to {least}, or lower that of queries")));
        }
        let queries = Texts::new(queries, query)?;
        let passages = Arc::new(Texts::new(passages, TextRules { max_length, prefix })?);
        Ok(PairTexts { queries, passages, max_length })
    }

    /// Tokens of a pair.
    pub fn length(&self, query: u32, passage: u32) -> Result<usize> {
        // The passage without its [CLS].
        Ok((self.queries.length(query)? + self.passages.length(passage)? - 1).min(self.max_length))
    }

    /// The pairs `(name, query, passage)` in this order as one stream.
    pub fn pack(&self, pairs: &[(u64, u32, u32)]) -> Result<TextBatch> {
        let names = pairs.iter().map(|&(name, ..)| name).collect();
        pack(
            names,
            |k| {
                let (_, query, passage) = pairs[k];
                self.length(query, passage)
            },
            |k, scratch, ids, types| {
                let (_, query, passage) = pairs[k];
                let first = self.queries.read(query, scratch)?;
                let (head, rest) = ids.split_at_mut(first.len());
                head.copy_from_slice(first);
                types[head.len()..].fill(1);
                let second = &self.passages.read(passage, scratch)?[1..];
                let inner = rest.len() - 1;
                rest[..inner].copy_from_slice(&second[..inner]);
                rest[inner] = second[second.len() - 1];
                Ok(())
            },
        )
    }
}

/// The groups of the samples of a batch.
struct Chosen {
    groups: Vec<(u64, Group)>,
    size: usize,
}

impl Chosen {
    fn of(groups: &Groups, part: Part, samples: Range<u64>) -> Result<Chosen> {
        let size = groups.pairs().settings().group;
        let made: Vec<Result<(u64, Group)>> =
            samples.into_par_iter().map(|sample| Ok((sample, groups.group_of(part, sample)?))).collect();
        // Errors in sample order: the same one is reported whatever the threads did.
        Ok(Chosen { groups: made.into_iter().collect::<Result<_>>()?, size })
    }

    /// Name, query and passage of every member.
    fn members(&self) -> impl Iterator<Item = (u64, u32, u32)> + '_ {
        self.groups.iter().flat_map(|(sample, group)| {
            let named = group.passages.iter().enumerate();
            named.map(|(m, &passage)| (member_name(*sample, m + 1), group.query, passage))
        })
    }

    fn passages(&self) -> Vec<u32> {
        self.groups.iter().flat_map(|(_, g)| g.passages.iter().copied()).collect()
    }

    fn rows(&self) -> Vec<u32> {
        self.groups.iter().map(|(_, g)| g.row).collect()
    }

    fn teacher(&self) -> Option<Vec<f32>> {
        let scores: Option<Vec<&Vec<f32>>> = self.groups.iter().map(|(_, g)| g.scores.as_ref()).collect();
        scores.filter(|s| !s.is_empty()).map(|s| s.into_iter().flatten().copied().collect())
    }
}
