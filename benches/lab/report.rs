//! The table: one JSON row for each comparison on standard output, and one for people on standard error.

use serde_json::{Value, json};

use crate::cases::{Case, Measured, Series};
use crate::stats::{Ratio, Samples};

/// What lunplugd may take of the floor on the host.
const HOST: f64 = 1.15;
/// What it may add to the floor and libvirt's own attach.
const WHOLE: f64 = 1.10;
/// Of several at once it may be no slower than the floor.
const AT_ONCE: f64 = 1.0;
/// How far the floors of one run may lie apart.
const DRIFT: f64 = 1.2;

/// Tells of a case as soon as it is measured.
pub fn tell(measured: &Measured) {
    let case = measured.case;
    let (host, whole) = limits(case);
    let mut lines = Vec::new();
    for what in ["attach", "detach"] {
        let (floor, ours) = (of(&measured.floor, what), of(&measured.ours, what));
        let peer = measured.peer.as_ref().map(|peer| of(peer, what));
        lines.push(compare(case, what, host, &floor, &ours, peer.as_ref()));
    }
    for what in ["whole attach", "whole detach"] {
        let (floor, ours) = (of(&measured.floor, what), of(&measured.ours, what));
        lines.push(compare(case, what, whole, &floor, &ours, None));
    }
    for_people(&lines);
    if let Some((attach, detach)) = measured.ours.syscalls {
        for (what, calls) in [("attach", attach), ("detach", detach)] {
            let what = format!("{}: {what}: lunplugd's system calls", case.name);
            lines.push(value(&what, calls as f64, ""));
        }
    }
    if measured.ours.troubles > 0 {
        let what = format!("{}: attaches that failed at first", case.name);
        lines.push(value(&what, measured.ours.troubles as f64, ""));
    }
    lines.iter().for_each(|line| println!("{line}"));
}

/// Tells of the whole run: where the machine was too restless, none of it counts.
pub fn tell_of_run(drift: &[f64], two_fsyncs: &Samples) {
    let (least, most) = (Samples(drift.to_vec()).min(), Samples(drift.to_vec()).max());
    let what = "the floor at the start, in the middle and at the end: most to least";
    let drift = value(what, most / least, "x");
    let ok = most / least <= DRIFT;
    println!("{}", merged(drift, json!({"at_most": DRIFT, "ok": ok})));
    println!(
        "{}",
        value("two fsyncs on the node's disk, in the times above", two_fsyncs.median(), "ms")
    );
    eprintln!("median (least-most) of milliseconds, and how many programs were started");
    if !ok {
        eprintln!("the machine was too restless: the run is void");
    }
}

fn value(what: &str, value: f64, unit: &str) -> Value {
    json!({
        "part": "lab", "what": what, "value": rounded(value), "unit": unit, "at_most": null, "ok": null,
    })
}

fn merged(mut line: Value, more: Value) -> Value {
    if let (Value::Object(line), Value::Object(more)) = (&mut line, more) {
        line.extend(more);
    }
    line
}

/// What the host's part, and the whole, may take of the floor.
fn limits(case: &Case) -> (Option<f64>, Option<f64>) {
    match case.at_once {
        1 => (Some(HOST), Some(WHOLE)),
        16 => (Some(AT_ONCE), None),
        _ => (None, None),
    }
}

/// Samples of one thing, and the programs that it took.
struct Figures<'a> {
    samples: &'a Samples,
    programs: usize,
}

fn of<'a>(series: &'a Series, what: &str) -> Figures<'a> {
    let (attach, detach) = series.programs;
    match what {
        "attach" => Figures { samples: &series.attach, programs: attach },
        "detach" => Figures { samples: &series.detach, programs: detach },
        "whole attach" => Figures { samples: &series.whole_attach, programs: attach },
        _ => Figures { samples: &series.whole_detach, programs: detach },
    }
}

fn compare(
    case: &Case,
    what: &str,
    limit: Option<f64>,
    floor: &Figures<'_>,
    ours: &Figures<'_>,
    peer: Option<&Figures<'_>>,
) -> Value {
    let ratio = Ratio::of(ours.samples, floor.samples);
    let told = |figures: &Figures<'_>| {
        let samples = figures.samples;
        json!({
            "median_ms": rounded(samples.median()), "min_ms": rounded(samples.min()),
            "max_ms": rounded(samples.max()), "programs": figures.programs,
        })
    };
    json!({
        "part": "lab", "what": format!("{}: {what}", case.name),
        "value": rounded(ratio.median), "unit": "x floor", "at_most": limit,
        "ok": limit.map(|most| ratio.median <= most),
        "interval": [rounded(ratio.low), rounded(ratio.high)],
        "floor": told(floor), "ours": told(ours), "peer": peer.map(told),
    })
}

fn for_people(lines: &[Value]) {
    eprintln!(
        "{:66} {:>22} {:>22} {:>17} {:>22}",
        "", "floor ms", "lunplug ms", "x floor", "os-brick ms"
    );
    for line in lines.iter().filter(|line| line["floor"].is_object()) {
        let told = |who: &str| {
            let of = &line[who];
            if of.is_null() {
                return String::new();
            }
            let number = |key: &str| of[key].as_f64().unwrap();
            let (least, most) = (number("min_ms"), number("max_ms"));
            format!("{:.0} ({least:.0}-{most:.0}) {}", number("median_ms"), of["programs"])
        };
        let interval = line["interval"].as_array().unwrap();
        let ratio = format!("{} ({}-{})", line["value"], interval[0], interval[1]);
        let what = line["what"].as_str().unwrap();
        let (floor, ours, peer) = (told("floor"), told("ours"), told("peer"));
        eprintln!("{what:66} {floor:>22} {ours:>22} {ratio:>17} {peer:>22}");
    }
}

fn rounded(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}
