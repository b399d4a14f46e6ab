//! stub
/// stub
pub struct TopK;
impl TopK {
    /// s
    pub fn new(_q: &[f32], _w: usize, _k: usize) -> Self {
        TopK
    }
    /// s
    pub fn add(&mut self, _f: u32, _r: &[f32]) {}
    /// s
    pub fn finish(self) -> Vec<Vec<(u32, f32)>> {
        Vec::new()
    }
}
