//! The steps of an attach, of an expand and of the way back: one list for stores, spans, metrics, phases, and the
//! points at which tests kill the process.
//!
//! A step's effect is announced in a store before it begins and struck from it after it was undone.
//! Which steps a volume takes depends on it: a LUN on existing sessions needs no login, a single
//! path no map.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use tracing::{Instrument, Span};

use crate::host::killpoint::KillPoints;
use crate::spec::Phase;
use crate::types::Malformed;

macro_rules! steps {
    ($($(#[doc = $doc:literal])+ $way:ident $step:ident $name:literal $phase:ident,)*) => {
        /// One step, in the order of an attach and then of a detach.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum Step {
            $($(#[doc = $doc])+ #[serde(rename = $name)] $step,)*
        }

        impl Step {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$step),*];

            /// Its name in stores, spans, metrics and kill points.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$step => $name,)* }
            }

            /// Which way it is on.
            pub const fn way(self) -> Way {
                match self { $(Self::$step => Way::$way,)* }
            }

            /// The phase that a volume is in once the step is done.
            pub const fn phase(self) -> Phase {
                match self { $(Self::$step => Phase::$phase,)* }
            }

            /// A span of its name.
            fn span(self) -> Span {
                match self { $(Self::$step => tracing::info_span!($name),)* }
            }
        }
    };
}

steps! {
    /// The volume is wanted: durable.
    Attach Intent "intent" Pending,
    /// Its owner is entered into the target's lease.
    Attach Lease "lease" Bound,
    /// Node records of the initiator, for the portals without a session.
    Attach Record "record" Bound,
    /// A login; one for all portals of the target where no foreign record would be touched.
    Attach Login "login" Bound,
    /// The LUN scanned for at one session, until its disk is there.
    Attach Scan "scan" Bound,
    /// One path's identity read and judged.
    Attach Identity "identity" Bound,
    /// The identity claimed for the owner on this node.
    Attach Claim "claim" Bound,
    /// The multipath map above the paths.
    Attach Map "map" Bound,
    /// The whole entered into the lease, and its identity durable.
    Attach Remember "remember" AttachedToNode,
    /// The block node in the pod.
    Attach Node "node" AttachedToNode,
    /// The container may open it.
    Attach Grant "grant" MountedToPod,
    /// libvirt's attach, and its confirmation.
    Attach Disk "disk" Ready,
    /// The guest's disk is noted.
    Attach Ready "ready" Ready,
    /// Every path of a ready volume rescanned, proven and compared.
    Expand Measure "measure" Ready,
    /// The multipath map grown to its paths' size, and that entered into the lease.
    Expand GrowMap "grow-map" Ready,
    /// libvirt's block resize: the guest is told.
    Expand TellGuest "tell-guest" Ready,
    /// The volume's I/O limits are wanted: durable.
    Retune Limits "limits" Ready,
    /// libvirt has given the guest's disk its limits.
    Retune Throttle "throttle" Ready,
    /// The volume is wanted no more: durable.
    Detach Removal "removal" Detaching,
    /// libvirt's detach: QEMU has let go.
    Detach Unplug "unplug" Detaching,
    /// The container may not open it any more.
    Detach Revoke "revoke" Detaching,
    /// The node goes.
    Detach Unlink "unlink" Detaching,
    /// Asked again, for a late attach of before could not open the device any more: there is no disk.
    Detach Confirm "confirm" UnmountedFromPod,
    /// Nobody holds the device, and the host's cache of it is written out.
    Detach Flush "flush" UnmountedFromPod,
    /// The map goes.
    Detach Unmap "unmap" UnmountedFromPod,
    /// One path goes.
    Detach DeletePath "delete-path" UnmountedFromPod,
    /// multipath's entries of it in wwids and bindings go.
    Detach ForgetMap "forget-map" UnmountedFromPod,
    /// The claim of the identity goes.
    Detach Unclaim "unclaim" UnmountedFromPod,
    /// The owner leaves the lease.
    Detach Unlease "unlease" UnmountedFromPod,
    /// One session of ours that nobody uses any more ends.
    Detach Logout "logout" UnmountedFromPod,
    /// One record of ours that nobody uses any more goes.
    Detach DeleteRecord "delete-record" UnmountedFromPod,
    /// Both stores forget the volume.
    Detach Gone "gone" Gone,
}

/// Which way a step is on. The way back is also walked by an attach that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// To the guest.
    Attach,
    /// A ready volume follows its LUN, which has grown.
    Expand,
    /// A volume's I/O limits are changed.
    Retune,
    /// Back.
    Detach,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// On which side of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edge {
    /// Announced, not begun.
    Before,
    /// Done, and nothing after it begun.
    After,
}

/// Right before or right after a step, written `before login`, `after map`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KillPoint {
    /// The step.
    pub step: Step,
    /// Its side.
    pub edge: Edge,
}

impl KillPoint {
    /// All points of a way, in its order.
    pub fn of(way: Way) -> impl Iterator<Item = Self> {
        let on_it = Step::ALL.iter().filter(move |step| step.way() == way);
        on_it.flat_map(|&step| [Edge::Before, Edge::After].map(|edge| Self { step, edge }))
    }
}

impl fmt::Display for KillPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let edge = match self.edge {
            Edge::Before => "before",
            Edge::After => "after",
        };
        write!(f, "{edge} {}", self.step)
    }
}

impl FromStr for KillPoint {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        let all = [Way::Attach, Way::Expand, Way::Retune, Way::Detach]
            .into_iter()
            .flat_map(KillPoint::of);
        all.into_iter().find(|point| point.to_string() == text.trim()).ok_or_else(|| Malformed {
            what: "kill point",
            value: text.into(),
            rule: "before or after, a space, and a step",
        })
    }
}

/// Runs steps: each in a span of its name, measured, with a kill point on either side.
#[derive(Clone)]
pub struct Tracker(Arc<dyn KillPoints>);

impl Tracker {
    /// A tracker with these kill points.
    pub fn new(points: Arc<dyn KillPoints>) -> Self {
        Self(points)
    }

    /// Runs one step. The point after it is reached only when it succeeded.
    ///
    /// Metric: histogram `lunplug_step_seconds` with labels `step` and `result` (`ok`, `error`).
    pub async fn run<T, E>(
        &self,
        step: Step,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        self.0.reach(KillPoint { step, edge: Edge::Before }).await;
        let began = Instant::now();
        let result = work.instrument(step.span()).await;
        let label = if result.is_ok() { "ok" } else { "error" };
        metrics::histogram!("lunplug_step_seconds", "step" => step.as_str(), "result" => label)
            .record(began.elapsed());
        if result.is_ok() {
            self.0.reach(KillPoint { step, edge: Edge::After }).await;
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_read_back() {
        for (i, step) in Step::ALL.iter().enumerate() {
            let json = serde_json::to_string(step).unwrap();
            assert_eq!(json, format!("\"{step}\""));
            assert_eq!(serde_json::from_str::<Step>(&json).unwrap(), *step);
            assert!(Step::ALL[..i].iter().all(|other| other.as_str() != step.as_str()), "{step}");
        }
        let ways = [Way::Attach, Way::Expand, Way::Detach];
        for point in ways.into_iter().flat_map(KillPoint::of) {
            assert_eq!(point.to_string().parse::<KillPoint>().unwrap(), point);
        }
        assert!("between login".parse::<KillPoint>().is_err());
    }

    #[test]
    fn phases_follow_the_order_of_the_steps() {
        let ways = Step::ALL.windows(2);
        for pair in ways {
            assert!(pair[0].phase() as u8 <= pair[1].phase() as u8, "{} {}", pair[0], pair[1]);
        }
    }
}
