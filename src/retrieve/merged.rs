//! A search by several ranks: each searches folders of its own, and rank 0 merges the lists and writes the run.
//!
//! First ranks tell each other how many queries they have and how these were encoded, then of some hundred queries at a time the ids and
//! scores of the best passages that each has found. Scores descend, and equal ones are ordered by folder and row, so that the run has the
//! bytes of a search over the whole. A rank opens its own folders only: those of others may lie on other machines.

use super::search::{Emit, Rows, Searched, Target, Written, search, write_lists};
use crate::error::{Error, Result};

/// Queries whose lists are told at a time.
const TOLD: usize = 256;

/// Gives the messages of all ranks, in their order, for this rank's own.
pub type Exchange<'a> = dyn Fn(&[u8]) -> Result<Vec<Vec<u8>>> + 'a;

/// Which rank this is, of how many.
pub struct Ranks<'a> {
    /// Its number, from 0.
    pub rank: usize,
    /// How many there are.
    pub size: usize,
    /// Folders of the whole corpus.
    pub folders: usize,
    /// Their messages.
    pub exchange: &'a Exchange<'a>,
}

impl Ranks<'_> {
    /// Which folders of the corpus this rank searches: every `size`th.
    ///
    /// # Errors
    /// Fewer folders than ranks.
    pub fn own(&self) -> Result<Vec<usize>> {
        enough(self.folders, self.size)?;
        Ok((self.rank..self.folders).step_by(self.size).collect())
    }
}

/// Refuses fewer folders than ranks.
///
/// # Errors
/// They are fewer.
pub fn enough(folders: usize, ranks: usize) -> Result<()> {
    match folders < ranks {
        true => Err(Error::usage(format!("{ranks} ranks, and {folders} folders of the corpus"))
            .remedy(format!("encode the corpus in parts (encode --shard I/{ranks}), or use at most {folders} ranks"))),
        false => Ok(()),
    }
}

/// A passage on a list.
#[derive(Clone, Debug, PartialEq)]
struct Hit {
    /// Folder and row.
    place: (u32, u64),
    score: f32,
    id: String,
}

/// Searches the folders `corpus`, which have these `numbers` among all of the corpus; rank 0 writes what all have found.
///
/// # Errors
/// As [`super::search::write_run`]; ranks with other queries or settings; the failure of a rank.
pub fn write_run(
    target: Target,
    (queries, corpus, numbers): (&Rows, &Rows, &[usize]),
    k: usize,
    to: &Written<'_>,
    ranks: &Ranks<'_>,
    watch: &dyn Fn(u64),
) -> Result<Searched> {
    let rows = agreed((target, k), queries, corpus, ranks)?;
    let find = |emit: &mut Emit<'_>| {
        let mut waiting: Vec<(String, Vec<Hit>)> = Vec::new();
        let mut tell = |waiting: &mut Vec<(String, Vec<Hit>)>| -> Result<()> {
            let own: Vec<&[Hit]> = waiting.iter().map(|(_, list)| &list[..]).collect();
            let all = (ranks.exchange)(&told(&own))?;
            if ranks.rank == 0 {
                let all =
                    all.iter().map(|one| heard(one, own.len()).ok_or_else(garbled)).collect::<Result<Vec<_>>>()?;
                for (i, (query, _)) in waiting.iter().enumerate() {
                    let list = merged(all.iter().flat_map(|lists| &lists[i]).collect(), k);
                    emit(query, &list.iter().map(|hit| (&hit.id[..], hit.score)).collect::<Vec<_>>())?;
                }
            }
            waiting.clear();
            Ok(())
        };
        search(target, (queries, corpus), k, watch, |query, list| {
            let hit = |&(row, score): &(u32, f32)| {
                let (folder, row) = corpus.place(u64::from(row));
                let id = corpus.folders()[folder].id(row).to_string();
                Hit { place: (numbers[folder] as u32, row), score, id }
            };
            waiting.push((query.to_string(), list.iter().map(hit).collect()));
            if waiting.len() == TOLD { tell(&mut waiting) } else { Ok(()) }
        })?;
        tell(&mut waiting)
    };
    match ranks.rank {
        0 => write_lists(to, rows, find),
        _ => find(&mut |_, _| Ok(())).map(|()| Searched { rows, ..Searched::default() }),
    }
}

/// The rows of all ranks, which must have the same queries, and ask for as many of as many folders.
fn agreed((target, k): (Target, usize), queries: &Rows, corpus: &Rows, ranks: &Ranks<'_>) -> Result<u64> {
    let made = queries.folders().iter().map(|folder| format!("{:?}", folder.meta().spec)).collect::<Vec<_>>().join(" ");
    let first = if queries.is_empty() { "" } else { queries.id(0) };
    let settings = format!("{k} {} {:?}", ranks.folders, target.1);
    let own = format!("{} {settings} {} {first} {made}", corpus.len(), queries.len());
    let all = (ranks.exchange)(own.as_bytes())?;
    let mut rows = 0;
    for (rank, one) in all.iter().enumerate() {
        let one = std::str::from_utf8(one).map_err(|_| garbled())?;
        let (own, theirs) = (own.split_once(' ').ok_or_else(garbled)?, one.split_once(' ').ok_or_else(garbled)?);
        if own.1 != theirs.1 {
            let cause = format!(
                "queries of rank {rank}, --top-k, the number type or the number of folders are not those of rank {}",
                ranks.rank
            );
            return Err(Error::refused(cause)
                .remedy("give all ranks the same embeddings of queries, the same flags, and parts of one --dtype"));
        }
        rows += theirs.0.parse::<u64>().map_err(|_| garbled())?;
    }
    Ok(rows)
}

fn garbled() -> Error {
    Error::refused("a rank has sent lists that cannot be read").remedy("report this as a defect")
}

/// The best `k` of some ranks' best.
fn merged(mut hits: Vec<&Hit>, k: usize) -> Vec<&Hit> {
    hits.sort_by(|a, b| b.score.partial_cmp(&a.score).unwrap_or(std::cmp::Ordering::Equal).then(a.place.cmp(&b.place)));
    hits.truncate(k);
    hits
}

/// Lists as bytes: how many hits; of each its folder, row, score and id.
fn told(lists: &[&[Hit]]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for list in lists {
        bytes.extend((list.len() as u32).to_le_bytes());
        for hit in *list {
            bytes.extend(hit.place.0.to_le_bytes());
            bytes.extend(hit.place.1.to_le_bytes());
            bytes.extend(hit.score.to_le_bytes());
            bytes.extend((hit.id.len() as u32).to_le_bytes());
            bytes.extend(hit.id.as_bytes());
        }
    }
    bytes
}

/// The `n` lists of [`told`].
fn heard(mut bytes: &[u8], n: usize) -> Option<Vec<Vec<Hit>>> {
    fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
        let (head, rest) = bytes.split_first_chunk()?;
        *bytes = rest;
        Some(*head)
    }
    let hit = |bytes: &mut &[u8]| {
        let place = (u32::from_le_bytes(take(bytes)?), u64::from_le_bytes(take(bytes)?));
        let (score, length) = (f32::from_le_bytes(take(bytes)?), u32::from_le_bytes(take(bytes)?));
        let (id, rest) = bytes.split_at_checked(length as usize)?;
        *bytes = rest;
        Some(Hit { place, score, id: String::from_utf8(id.to_vec()).ok()? })
    };
    let mut list = || -> Option<Vec<Hit>> {
        let count = u32::from_le_bytes(take(&mut bytes)?);
        (0..count).map(|_| hit(&mut bytes)).collect()
    };
    let lists = (0..n).map(|_| list()).collect::<Option<Vec<_>>>()?;
    bytes.is_empty().then_some(lists)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hit(folder: u32, row: u64, score: f32) -> Hit {
        Hit { place: (folder, row), score, id: format!("p{folder}-{row}é") }
    }

    #[test]
    fn lists_are_told_whole_or_not_at_all() {
        let lists = [vec![hit(0, 1, 2.5), hit(3, u64::MAX, -0.0)], vec![], vec![hit(1, 0, f32::MIN)]];
        let bytes = told(&lists.iter().map(|list| &list[..]).collect::<Vec<_>>());
        assert_eq!(heard(&bytes, 3).unwrap(), lists);
        assert!((0..bytes.len()).all(|end| heard(&bytes[..end], 3).is_none()));
        assert!(heard(&bytes, 2).is_none() && heard(&bytes, 4).is_none());
    }

    #[test]
    fn equal_scores_are_ordered_by_folder_and_row() {
        let all = [hit(2, 0, 1.0), hit(0, 7, 1.0), hit(1, 3, 2.0), hit(0, 2, 1.0), hit(1, 1, 0.5)];
        let places: Vec<_> = merged(all.iter().collect(), 4).into_iter().map(|hit| hit.place).collect();
        assert_eq!(places, [(1, 3), (0, 2), (0, 7), (2, 0)]);
    }

    #[test]
    fn folders_are_dealt_out() {
        let ranks = |rank, size, folders| Ranks { rank, size, folders, exchange: &|_| Ok(vec![]) };
        assert_eq!(
            (0..2).map(|rank| ranks(rank, 2, 5).own().unwrap()).collect::<Vec<_>>(),
            [vec![0, 2, 4], vec![1, 3]]
        );
        let few = ranks(0, 3, 2).own().unwrap_err().to_string();
        assert!(few.contains("3 ranks, and 2 folders") && few.contains("--shard I/3"), "{few}");
    }
}
