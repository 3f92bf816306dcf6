//! The cases, and how each contender goes through one.

use std::fs::{self, File};
use std::io::Write;
use std::time::Duration;

use crate::floor::Floor;
use crate::node::{self, Lun, Pod, sh};
use crate::ours::Ours;
use crate::peer::Peer;
use crate::programs::{Programs, Syscalls};
use crate::stats::Samples;
use crate::timed;

/// A row of the table.
pub struct Case {
    pub name: &'static str,
    /// Paths to each LUN; with two there is a map.
    pub portals: usize,
    /// Whether the target is logged in to as well, and logged out of.
    pub login: bool,
    pub find_multipaths: &'static str,
    pub at_once: u16,
    /// To how many VMs they are given in turn.
    pub vms: usize,
}

/// Of more volumes at once than this a repetition takes minutes.
const MANY: u16 = 16;
/// How often such a case is gone through.
const FEW: usize = 3;

impl Case {
    fn repetitions(&self, wanted: usize) -> usize {
        if self.at_once > MANY { wanted.min(FEW) } else { wanted }
    }

    /// The peer does one after the other: it is spared most of it, and no pairs are made of it.
    fn repetitions_of_peer(&self, wanted: usize) -> usize {
        match self.at_once {
            1 => wanted,
            ..=MANY => wanted.min(FEW),
            _ => 0,
        }
    }
}

const fn case(
    name: &'static str,
    portals: usize,
    login: bool,
    find_multipaths: &'static str,
    at_once: u16,
) -> Case {
    Case { name, portals, login, find_multipaths, at_once, vms: 1 }
}

/// VMs of each contender.
pub const VMS: usize = 2;

/// The same with as many volumes at once, half of them for another VM.
const TWO_VMS: Case =
    Case { vms: VMS, ..case("16 at once, single path, 8 to each of two VMs", 1, false, "yes", 16) };

/// Of a single path multipathd makes no map where it waits for a second.
pub const CASES: &[Case] = &[
    case("single path, existing session", 1, false, "yes", 1),
    case("single path, first LUN", 1, true, "yes", 1),
    case("two paths and map, existing sessions, find_multipaths no", 2, false, "no", 1),
    case("two paths and map, existing sessions, find_multipaths yes", 2, false, "yes", 1),
    case("two paths and map, first LUN", 2, true, "no", 1),
    case("16 at once, single path", 1, false, "yes", 16),
    TWO_VMS,
    case("16 at once, two paths and map", 2, false, "no", 16),
    case("75 at once, two paths and map", 2, false, "no", 75),
];

/// How long one contender took.
#[derive(Debug, Clone, Copy)]
pub struct Took {
    /// On the host alone.
    pub host: Duration,
    /// To the guest and back.
    pub whole: Duration,
}

/// One way to attach LUNs and to detach them again, all of a case at once.
pub trait Contender {
    /// The process whose programs are counted.
    fn pid(&self) -> u32;
    /// What is not a part of the case, before and after it.
    fn prepare(&mut self, _: &Case) {}
    fn tidy_up(&mut self, _: &Case) {}
    fn attach(&mut self, case: &Case) -> Took;
    fn detach(&mut self, case: &Case) -> Took;
    /// How often something has failed since this was last asked.
    fn troubles(&mut self) -> usize {
        0
    }
}

/// One contender's samples of a case, one a repetition, in milliseconds.
#[derive(Debug, Default)]
pub struct Series {
    pub attach: Samples,
    pub detach: Samples,
    pub whole_attach: Samples,
    pub whole_detach: Samples,
    /// Programs that were started to attach, and to detach.
    pub programs: (usize, usize),
    /// System calls to attach, and to detach; counted of lunplugd alone.
    pub syscalls: Option<(u64, u64)>,
    /// How often something failed, and was tried again, in the times above.
    pub troubles: usize,
}

impl Series {
    fn run(&mut self, contender: &mut dyn Contender, case: &Case) {
        contender.prepare(case);
        let (attach, detach) = (contender.attach(case), contender.detach(case));
        contender.tidy_up(case);
        self.attach.push(attach.host);
        self.whole_attach.push(attach.whole);
        self.detach.push(detach.host);
        self.whole_detach.push(detach.whole);
        self.troubles += contender.troubles();
    }

    /// Goes through the case once without timing it.
    fn count(&mut self, contender: &mut dyn Contender, case: &Case) {
        contender.prepare(case);
        let programs = Programs::of(contender.pid());
        contender.attach(case);
        let attached = programs.so_far();
        contender.detach(case);
        self.programs = (attached, programs.so_far() - attached);
        drop(programs);
        contender.tidy_up(case);
    }

    fn count_syscalls(&mut self, contender: &mut dyn Contender, case: &Case) {
        contender.prepare(case);
        let syscalls = Syscalls::of(contender.pid());
        contender.attach(case);
        let attach = syscalls.end();
        let syscalls = Syscalls::of(contender.pid());
        contender.detach(case);
        self.syscalls = Some((attach, syscalls.end()));
        contender.tidy_up(case);
    }
}

/// A case's figures.
pub struct Measured {
    pub case: &'static Case,
    pub floor: Series,
    pub ours: Series,
    pub peer: Option<Series>,
}

/// Those that are compared, on one node; each has LUNs of its own, all alike.
pub struct Contenders {
    floor: Floor,
    ours: Ours,
    peer: Option<Peer>,
    keeper: Vec<Lun>,
    is_kept: bool,
}

/// As many LUNs as a case has at once.
const LUNS: u16 = 75;
/// How often the floor's reference is taken at each point of the run.
const REFERENCES: usize = 5;

impl Contenders {
    pub fn set_up(peer: bool) -> Self {
        sh("for pod in bench bench2 floor floor2; do pod down $pod; done; target down; target up
            daemon start; daemon configure guest_unproven=allow");
        let iqn = node::iqn();
        let keeper = node::make_luns(0, 1);
        let [floors, ours, peers] = [1, 1 + LUNS, 1 + 2 * LUNS].map(|n| node::make_luns(n, LUNS));
        Self {
            ours: Ours::new(&iqn, ours, &["bench", "bench2"].map(Pod::up)),
            floor: Floor::new(&iqn, floors, ["floor", "floor2"].map(Pod::up)),
            peer: peer.then(|| Peer::start(&iqn, peers)),
            keeper,
            is_kept: false,
        }
    }

    /// Whether the target is logged in to: by a volume that stays.
    fn keep_sessions(&mut self, keep: bool) {
        if keep && !self.is_kept {
            self.ours.add(&self.keeper, 2, 1);
        } else if !keep && self.is_kept {
            self.ours.remove(&self.keeper, 1);
        }
        self.is_kept = keep;
    }

    /// One case, each contender in turn; who begins changes with the repetition.
    pub fn measure(&mut self, case: &'static Case, repetitions: usize) -> Measured {
        self.set(case);
        let peers = case.repetitions_of_peer(repetitions);
        let peer = (self.peer.is_some() && peers > 0).then(Series::default);
        let mut measured =
            Measured { case, floor: Series::default(), ours: Series::default(), peer };
        measured.floor.count(&mut self.floor, case);
        measured.ours.count(&mut self.ours, case);
        if let (Some(peer), Some(series)) = (&mut self.peer, &mut measured.peer) {
            series.count(peer, case);
        }
        for repetition in 0..case.repetitions(repetitions) {
            for turn in 0..3 {
                match (repetition + turn) % 3 {
                    0 => measured.floor.run(&mut self.floor, case),
                    1 => measured.ours.run(&mut self.ours, case),
                    _ if repetition >= peers => {}
                    _ => {
                        if let (Some(peer), Some(series)) = (&mut self.peer, &mut measured.peer) {
                            series.run(peer, case);
                        }
                    }
                }
            }
        }
        measured
    }

    pub fn count_syscalls(&mut self, case: &Case, measured: &mut Measured) {
        measured.ours.count_syscalls(&mut self.ours, case);
    }

    fn set(&mut self, case: &Case) {
        node::find_multipaths(case.find_multipaths);
        self.keep_sessions(!case.login);
    }

    /// The floor of one case, which tells at several points of a run whether the machine is as it was.
    pub fn reference(&mut self) -> f64 {
        let case = &CASES[0];
        self.set(case);
        let mut series = Series::default();
        (0..REFERENCES).for_each(|_| series.run(&mut self.floor, case));
        series.attach.median()
    }

    /// What making two records durable takes on the node's disk, in milliseconds.
    pub fn two_fsyncs() -> Samples {
        let mut samples = Samples::default();
        let mut file = File::create("/var/lib/lunplug/bench").unwrap();
        for _ in 0..20 {
            let (took, ()) = timed(|| {
                for _ in 0..2 {
                    file.write_all(&[0; 4096]).unwrap();
                    file.sync_data().unwrap();
                }
            });
            samples.push(took);
        }
        fs::remove_file("/var/lib/lunplug/bench").unwrap();
        samples
    }
}
