//! `report` and `watch`: a real run on a page that is whole, harmless and small; wrong input in one line; a run followed in the terminal.

#[path = "report/browser.rs"]
mod browser;
#[path = "report/follow.rs"]
mod follow;
#[path = "report/page.rs"]
mod page;
#[path = "report/refused.rs"]
mod refused;
#[path = "report/support.rs"]
mod support;
#[path = "train/world.rs"]
mod world;

/// Where `world` finds the folder that it works in.
mod toy {
    pub use crate::support::folder;
}
