//! What a look-up costs by number of peers, as JSON in nanoseconds: our table, and flanneld's list of routes beside
//! it. `cargo run --release --example lookup`

use std::hint::black_box;
use std::net::Ipv4Addr;
use std::time::Instant;

use dataplane::routes::{Route, Routes};

const LOOK_UPS: u32 = 100_000;
const ROUNDS: usize = 7;

fn main() {
    let sizes = [10_u32, 100, 1_000, 10_000];
    let mut table = Vec::new();
    let mut list = Vec::new();
    for peers in sizes {
        let lines: Vec<(u32, u32)> = (0..peers)
            .map(|n| (0x0a00_0000 | n << 8, 0xc0a8_0000 + n + 1))
            .collect();
        let routes = Routes::new(lines.iter().map(|(base, peer)| {
            Route::new(Ipv4Addr::from_bits(*base), 24, Ipv4Addr::from_bits(*peer)).expect("a route")
        }))
        .expect("no subnet twice");
        let asked = destinations(peers);
        table.push(median(&asked, LOOK_UPS, |destination| {
            routes
                .find(Ipv4Addr::from_bits(destination))
                .map(Ipv4Addr::to_bits)
        }));
        // Searched from its front, so that its time grows with its length; fewer look-ups, as it takes long.
        list.push(median(&asked, LOOK_UPS / 20, |destination| {
            let base = destination & 0xffff_ff00;
            lines.iter().find(|line| line.0 == base).map(|line| line.1)
        }));
    }
    let row = |name: &str, times: &[f64]| {
        let cells = sizes
            .iter()
            .zip(times)
            .map(|(size, time)| format!("\"{size}\": {time:.1}"));
        format!("\"{name}\": {{{}}}", cells.collect::<Vec<_>>().join(", "))
    };
    println!(
        "{{{}, {}}}",
        row("flanctl", &table),
        row("a list, as flanneld has it", &list)
    );
}

/// Spread over all peers, the same each time.
fn destinations(peers: u32) -> Vec<u32> {
    let mut state = 1_u32;
    (0..LOOK_UPS)
        .map(|_| {
            state = state.wrapping_mul(1_103_515_245).wrapping_add(12_345);
            0x0a00_0000 | ((state >> 8) % peers) << 8 | 2
        })
        .collect()
}

/// Nanoseconds of one look-up.
fn median(asked: &[u32], count: u32, find: impl Fn(u32) -> Option<u32>) -> f64 {
    let mut times: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let began = Instant::now();
            for destination in &asked[..count as usize] {
                black_box(find(black_box(*destination)));
            }
            began.elapsed().as_secs_f64() * 1e9 / f64::from(count)
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[ROUNDS / 2]
}
