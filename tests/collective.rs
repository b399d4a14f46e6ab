//! Ranks of one run: what they do together, what they train, and what becomes of all when one fails.

#[path = "collective/buckets.rs"]
mod buckets;
#[path = "collective/encoded.rs"]
mod encoded;
#[path = "collective/failures.rs"]
mod failures;
#[path = "collective/judged.rs"]
mod judged;
#[path = "collective/memory.rs"]
mod memory;
#[cfg(feature = "mpi")]
#[path = "collective/mpi.rs"]
mod mpi;
#[path = "collective/namespaces.rs"]
mod namespaces;
#[path = "collective/operations.rs"]
mod operations;
#[path = "train/pair_world.rs"]
mod pair_world;
#[path = "collective/rendezvous.rs"]
mod rendezvous;
#[path = "collective/repeated.rs"]
mod repeated;
#[path = "collective/resumed.rs"]
mod resumed;
#[path = "collective/runs.rs"]
mod runs;
#[path = "collective/steps.rs"]
mod steps;
#[path = "collective/support.rs"]
mod support;
#[path = "collective/trained.rs"]
mod trained;
#[path = "train/world.rs"]
mod world;

/// What the worlds of `train`'s tests need of its toy.
mod toy {
    /// A folder for the test, in memory where the system offers it.
    pub fn folder() -> tempfile::TempDir {
        let memory = std::path::Path::new("/dev/shm");
        if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap()
    }
}
