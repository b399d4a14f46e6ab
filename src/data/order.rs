//! Which samples a step works on: order of the texts, held-out split, batches, ranks.
//!
//! Samples are numbered over the whole run, epochs included, and everything here is a pure function of such a number. So the state of the
//! data is one `u64`, the cursor: the number of the first sample not yet used. Resuming at a cursor replays nothing, and how the samples
//! of a step are spread over micro-batches and ranks changes neither their order nor their masks.

use std::ops::Range;

use super::corpus::Corpus;
use super::masking::LONGEST_TEXT;
use crate::error::{Error, Result};
use crate::rng::{Permutation, Site};

/// One of the two parts of a corpus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// What the model is trained on.
    Train,
    /// What it is evaluated on and never trained on; its masks are the same at every evaluation.
    HeldOut,
}

impl Part {
    /// The part's name in the keys of random streams: samples of equal number in the two parts get unrelated masks.
    pub fn pass(self) -> u64 {
        match self {
            Part::Train => 0,
            Part::HeldOut => 1,
        }
    }
}

/// Order of a corpus' texts, as a pure function of (seed, epoch, index), and its exact held-out split.
///
/// A permutation of all texts deals the first `held_out` to [`Part::HeldOut`] and the rest to [`Part::Train`]; a permutation for each
/// epoch orders the latter.
#[derive(Clone, Debug)]
pub struct Order {
    seed: u64,
    texts: u64,
    held_out: u64,
    split: Permutation,
}

impl Order {
    /// The order of `texts` texts of which `held_out` are kept for evaluation. At least one text must remain for training.
    pub fn new(seed: u64, texts: u64, held_out: u64) -> Result<Self> {
        if texts == 0 {
            return Err(Error::refused("there are no texts to train on").remedy("tokenize an input that holds some"));
        }
        if held_out >= texts {
            return Err(Error::refused(format!(
                "{held_out} of {texts} texts held out for evaluation leave none to train on"
            ))
            .remedy(format!("hold out at most {}", texts - 1)));
        }
        Ok(Order { seed, texts, held_out, split: Permutation::new(seed, 0, Site::Split, texts) })
    }

    /// Number of texts of a part.
    pub fn texts(&self, part: Part) -> u64 {
        match part {
            Part::Train => self.texts - self.held_out,
            Part::HeldOut => self.held_out,
        }
    }

    /// The text of a sample. Samples of [`Part::HeldOut`] are numbered below [`Order::texts`].
    pub fn text(&self, part: Part, sample: u64) -> u64 {
        match part {
            Part::HeldOut => self.split.at(sample),
            Part::Train => {
                let train = self.texts - self.held_out;
                let epoch = Permutation::new(self.seed, sample / train, Site::Order, train);
                self.split.at(self.held_out + epoch.at(sample % train))
            }
        }
    }

    /// Samples in `epochs` epochs of training, the last one perhaps in part.
    pub fn samples(&self, epochs: f64) -> u64 {
        (self.texts(Part::Train) as f64 * epochs).round() as u64
    }
}

/// How much goes into one micro-batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchSize {
    /// This many sequences.
    Sequences(u64),
    /// As many sequences, in sample order, as have at most this many tokens together.
    Tokens(u64),
}

/// How samples are gathered into steps.
///
/// A step has `accumulation × ranks` micro-batches of neighbouring samples; rank r works on the micro-batches r, r + ranks, …. So the
/// same number of micro-batches gives the same steps, however many ranks share them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batching {
    /// Size of a micro-batch.
    pub size: BatchSize,
    /// Micro-batches of one rank in one step.
    pub accumulation: u64,
    /// Processes that share a step.
    pub ranks: u64,
    /// Longer texts are cut to this many tokens, the last of which stays the last (`[SEP]`).
    pub max_length: usize,
}

impl Batching {
    /// Refuses settings that give steps without samples.
    fn check(&self) -> Result<()> {
        let zero = |name: &str| Err(Error::usage(format!("{name} is 0")).remedy("choose at least 1"));
        match self.size {
            BatchSize::Sequences(0) => zero("the batch size"),
            BatchSize::Tokens(limit) if limit < self.max_length as u64 => {
                let cause = format!("{limit} tokens per batch do not hold one text of {} tokens", self.max_length);
                Err(Error::usage(cause).remedy("raise --tokens-per-batch or lower --max-length"))
            }
            _ if self.accumulation == 0 => zero("the number of accumulated micro-batches"),
            _ if self.ranks == 0 => zero("the number of ranks"),
            _ if !(2..=LONGEST_TEXT).contains(&self.max_length) => {
                let cause = format!("texts cannot be cut to {} tokens", self.max_length);
                Err(Error::usage(cause).remedy(format!("choose a --max-length from 2 to {LONGEST_TEXT}")))
            }
            _ => Ok(()),
        }
    }
}

/// The steps over one part of a corpus, up to an end.
#[derive(Clone, Debug)]
pub struct Plan {
    order: Order,
    part: Part,
    batching: Batching,
    end: u64,
}

/// Which of the ranks that share a run this process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Its number, from 0.
    pub rank: u64,
    /// Ranks in all.
    pub ranks: u64,
}

impl Default for Share {
    fn default() -> Self {
        Share { rank: 0, ranks: 1 }
    }
}

/// What one rank does of a round: of micro-batches one a rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Micro {
    /// Its samples, ascending.
    pub own: Vec<u64>,
    /// The samples of all ranks.
    pub round: Range<u64>,
}

impl Micro {
    /// The samples of a rank that has neighbouring ones.
    pub fn neighbours(&self) -> Range<u64> {
        self.own.first().map_or(self.round.end..self.round.end, |&first| first..first + self.own.len() as u64)
    }
}

/// The samples of one step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepPlan {
    /// Sample numbers of each micro-batch, of all ranks.
    pub micro: Vec<Range<u64>>,
    /// The cursor after the step.
    pub next: u64,
}

impl Plan {
    /// The steps over the samples of `part` below `end` (for training see [`Order::samples`]; a part is held out once, so there `end` is
    /// at most its number of texts). The last step may be smaller than the others and have empty micro-batches.
    pub fn new(order: Order, part: Part, batching: Batching, end: u64) -> Result<Self> {
        batching.check()?;
        let held_out = order.texts(Part::HeldOut);
        if part == Part::HeldOut && end > held_out {
            let cause = format!("evaluation on {end} of {held_out} held-out texts");
            return Err(Error::usage(cause).remedy("hold out more texts or evaluate on fewer"));
        }
        Ok(Plan { order, part, batching, end })
    }

    /// The order of the texts.
    pub fn order(&self) -> &Order {
        &self.order
    }

    /// The part.
    pub fn part(&self) -> Part {
        self.part
    }

    /// The batching.
    pub fn batching(&self) -> &Batching {
        &self.batching
    }

    /// The step that begins at `cursor`; `None` at the end.
    pub fn step(&self, corpus: &dyn Corpus, cursor: u64) -> Result<Option<StepPlan>> {
        if cursor >= self.end {
            return Ok(None);
        }
        let mut next = cursor;
        let mut micro = Vec::new();
        for _ in 0..self.batching.accumulation.saturating_mul(self.batching.ranks) {
            let first = next;
            next = match self.batching.size {
                BatchSize::Sequences(n) => first.saturating_add(n).min(self.end),
                BatchSize::Tokens(limit) => self.fill(corpus, first, limit)?,
            };
            micro.push(first..next);
        }
        Ok(Some(StepPlan { micro, next }))
    }

    /// What a rank does of a step, micro-batch by micro-batch. A part of a round that is cut by tokens is one of neighbours. Of one that
    /// is cut by sequences every rank gets about as many tokens, if `even`: they are dealt out from the longest to the shortest, back
    /// and forth.
    pub fn micro(&self, corpus: &dyn Corpus, step: &StepPlan, rank: u64, even: bool) -> Result<Vec<Micro>> {
        let ranks = self.batching.ranks as usize;
        let deal = even && ranks > 1 && matches!(self.batching.size, BatchSize::Sequences(_));
        let part = |round: &[Range<u64>]| {
            let (Some(first), Some(last)) = (round.first(), round.last()) else {
                return Ok(Micro { own: Vec::new(), round: 0..0 });
            };
            let all = first.start..last.end;
            let own = match (deal, round.get(rank as usize)) {
                (true, _) => self.dealt(corpus, all.clone(), rank as usize)?,
                (false, own) => own.cloned().map_or_else(Vec::new, Iterator::collect),
            };
            Ok(Micro { own, round: all })
        };
        step.micro.chunks(ranks).map(part).collect()
    }

    /// The samples of a round that are dealt to a rank.
    fn dealt(&self, corpus: &dyn Corpus, round: Range<u64>, rank: usize) -> Result<Vec<u64>> {
        let ranks = self.batching.ranks as usize;
        let length = |sample| Ok(corpus.length(self.order.text(self.part, sample))?.min(self.batching.max_length));
        let mut cards = round.map(|sample| Ok((length(sample)?, sample))).collect::<Result<Vec<(usize, u64)>>>()?;
        cards.sort_unstable_by_key(|&(length, sample)| (std::cmp::Reverse(length), sample));
        let taken = cards.chunks(ranks).enumerate().filter_map(|(turn, cards)| {
            let seat = if turn % 2 == 0 { rank } else { ranks - 1 - rank };
            cards.get(seat).map(|card| card.1)
        });
        let mut own: Vec<u64> = taken.collect();
        own.sort_unstable();
        Ok(own)
    }

    /// Number of steps from `cursor` to the end. With [`BatchSize::Tokens`] this looks at the length of every sample, a fraction
    /// of a microsecond each.
    pub fn steps(&self, corpus: &dyn Corpus, mut cursor: u64) -> Result<u64> {
        if let BatchSize::Sequences(n) = self.batching.size {
            let samples = n.saturating_mul(self.batching.accumulation).saturating_mul(self.batching.ranks);
            return Ok(self.end.saturating_sub(cursor).div_ceil(samples));
        }
        let mut steps = 0;
        while let Some(step) = self.step(corpus, cursor)? {
            cursor = step.next;
            steps += 1;
        }
        Ok(steps)
    }

    /// The end of the micro-batch of at most `limit` tokens that begins at sample `first`. Always at least one sample: the
    /// limit was held to the longest text.
    fn fill(&self, corpus: &dyn Corpus, first: u64, limit: u64) -> Result<u64> {
        let mut tokens = 0u64;
        for sample in first..self.end {
            let length = corpus.length(self.order.text(self.part, sample))?.min(self.batching.max_length);
            tokens += length as u64;
            if tokens > limit {
                return Ok(sample);
            }
        }
        Ok(self.end)
    }
}
