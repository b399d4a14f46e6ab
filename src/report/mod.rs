//! What runs did, made visible: a page of their curves, settings and checkpoints in one HTML file, and the same in a terminal while a run
//! goes on. Everything is drawn here, without scripts and without anything from the network.
//!
//! - [`history`], [`run`]: what `train` leaves in its output folder, read
//! - [`chart`], [`scale`]: curves as SVG; [`html`]: text made harmless, tables, figures
//! - [`masks`]: the masks of one text of a run; [`breakdown`]: where the time of a step went
//! - [`page`]: all of it on one page; [`watch`]: a few lines for a terminal

pub mod breakdown;
pub mod chart;
pub mod history;
pub mod html;
pub mod masks;
pub mod page;
pub mod run;
pub mod scale;
pub mod watch;
