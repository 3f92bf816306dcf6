//! Waiting until a volume is where it was asked to be, with its phases shown as they come.
//!
//! A reason that goes away by itself keeps the wait going; one that somebody has to act on ends it.
//! lunplugd goes on either way: ending the wait cancels nothing.

use std::path::Path;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::{Instant, timeout_at};

use super::client::{Client, connect};
use super::failure::{Exit, Failure};
use super::{Screen, output};
use crate::api::v1;
use crate::api::v1::watch_volumes_response::Event;
use crate::reason::Reason;

/// Between two tries to reach a daemon that is being restarted.
const RECONNECT: Duration = Duration::from_millis(500);

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Goal {
    /// The guest has it.
    Ready,
    /// Nothing of it is left.
    Gone,
}

/// What one look at the volume means.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Wait,
    Reached,
    Failed(Failure),
}

/// Judges a volume's state; `None` when there is no such volume.
fn judge(goal: Goal, volume: Option<&v1::Volume>) -> Verdict {
    use v1::Phase as P;
    let Some(volume) = volume else {
        return match goal {
            Goal::Gone => Verdict::Reached,
            Goal::Ready => called_off(),
        };
    };
    match (goal, volume.phase()) {
        (Goal::Ready, P::Ready) | (Goal::Gone, P::Gone) => Verdict::Reached,
        (Goal::Ready, P::Detaching | P::UnmountedFromPod | P::Gone) => called_off(),
        _ => match &volume.trouble {
            // It is recorded, and comes with the VM.
            Some(trouble) if goal == Goal::Ready && is_off(trouble) => Verdict::Reached,
            Some(trouble) if !trouble.transient => Verdict::Failed(Failure::trouble(trouble)),
            _ => Verdict::Wait,
        },
    }
}

/// Whether it is the VM's being off that keeps a volume from its guest.
fn is_off(trouble: &v1::Trouble) -> bool {
    [Reason::VmNotRunning, Reason::PodGone].iter().any(|off| trouble.reason == off.code())
}

fn called_off() -> Verdict {
    let message = "the volume was removed while it was being added";
    Verdict::Failed(Failure::of(Reason::Cancelled, message))
}

/// What came of a volume that was waited for: its last state, and why it did not get there.
pub(super) type Ended = (v1::Volume, Result<(), Failure>);

/// Follows `volume` from the state the daemon answered with until the goal is reached, it fails, or
/// the time is over. Returns its last state.
pub(super) async fn wait(
    socket: &Path,
    client: Client,
    goal: Goal,
    volume: v1::Volume,
    patience: Duration,
    screen: &mut Screen<'_>,
) -> Result<v1::Volume, Failure> {
    let ended = wait_all(socket, client, vec![(goal, volume)], patience, screen).await?;
    // There is one for each.
    let mut ended = ended.into_iter().map(|(volume, end)| end.map(|()| volume));
    ended.next().unwrap_or_else(|| Ok(v1::Volume::default()))
}

/// The same for volumes of one VM, until each of them has come to its end.
pub(super) async fn wait_all(
    socket: &Path,
    mut client: Client,
    volumes: Vec<(Goal, v1::Volume)>,
    patience: Duration,
    screen: &mut Screen<'_>,
) -> Result<Vec<Ended>, Failure> {
    let mut shown = Shown::new(screen, volumes.len() > 1);
    let deadline = Instant::now() + patience;
    let mut wait = Wait { all: volumes.into_iter().map(One::new).collect() };
    for one in &mut wait.all {
        shown.volume(one)?;
    }
    let followed = async {
        while !wait.follow(&mut client, &mut shown).await? {
            // The daemon is being restarted. It goes on with what it had, so the wait does too;
            // whether it counts on from where it was is its own affair.
            wait.all.iter_mut().for_each(|one| one.floor = 0);
            shown.note("lunplugd went away; waiting for it")?;
            client = loop {
                tokio::time::sleep(RECONNECT).await;
                if let Ok(client) = connect(socket).await {
                    break client;
                }
            };
        }
        Ok::<(), Failure>(())
    };
    let ended = timeout_at(deadline, followed).await;
    shown.done();
    // What was not in time is told of each.
    ended.unwrap_or(Ok(()))?;
    let end = |one: One| {
        let end = one.end.unwrap_or_else(|| Err(too_late(&one.last, patience)));
        (one.last, end)
    };
    Ok(wait.all.into_iter().map(end).collect())
}

fn too_late(volume: &v1::Volume, patience: Duration) -> Failure {
    let phase = output::phase(volume.phase());
    let why = match &volume.trouble {
        Some(trouble) => format!(" ({}: {})", trouble.reason, trouble.message),
        None => String::new(),
    };
    let message = format!("still {phase} after {}s{why}", patience.as_secs());
    let remedy = "lunplugd goes on with it: follow it with lunplug watch, or give --timeout.";
    Failure {
        exit: Exit::Unavailable,
        remedy: remedy.into(),
        ..Failure::of(Reason::DeadlineExceeded, message)
    }
}

/// One volume that is waited for.
struct One {
    goal: Goal,
    /// States of lower generations are older than the daemon's answer.
    floor: u64,
    last: v1::Volume,
    /// What came of it.
    end: Option<Result<(), Failure>>,
    /// What was shown of it last.
    shown: Option<(v1::Phase, String)>,
    /// How much of what was given up was told.
    gave_up: usize,
    /// That its VM needs an HBA was told.
    told_hba: bool,
}

impl One {
    fn new((goal, last): (Goal, v1::Volume)) -> Self {
        Self {
            goal,
            floor: last.generation,
            last,
            end: None,
            shown: None,
            gave_up: 0,
            told_hba: false,
        }
    }

    fn name(&self) -> &str {
        self.last.spec.as_ref().map(|spec| spec.name.as_str()).unwrap_or_default()
    }

    fn is(&self, volume: &v1::Volume) -> bool {
        let name = volume.spec.as_ref().map(|spec| spec.name.as_str());
        volume.vm == self.last.vm && name == Some(self.name())
    }

    fn look(
        &mut self,
        found: Option<v1::Volume>,
        shown: &mut Shown<'_, '_>,
    ) -> Result<(), Failure> {
        let verdict = match found {
            Some(volume) if volume.generation < self.floor => return Ok(()),
            Some(volume) => {
                self.last = volume;
                judge(self.goal, Some(&self.last))
            }
            None => {
                self.last.set_phase(v1::Phase::Gone);
                self.last.trouble = None;
                judge(self.goal, None)
            }
        };
        self.end = match verdict {
            Verdict::Wait => None,
            Verdict::Reached => Some(Ok(())),
            Verdict::Failed(failure) => Some(Err(failure)),
        };
        shown.volume(self)
    }
}

/// All that is waited for.
struct Wait {
    all: Vec<One>,
}

impl Wait {
    /// Those that are waited for still.
    fn left(&mut self) -> impl Iterator<Item = &mut One> {
        self.all.iter_mut().filter(|one| one.end.is_none())
    }

    /// Follows one stream until nothing is waited for: false when the daemon went away.
    async fn follow(
        &mut self,
        client: &mut Client,
        shown: &mut Shown<'_, '_>,
    ) -> Result<bool, Failure> {
        let Some(one) = self.left().next() else { return Ok(true) };
        let request = v1::WatchVolumesRequest { vm: one.last.vm.clone() };
        let mut stream = match client.watch_volumes(request).await {
            Ok(stream) => stream.into_inner(),
            Err(status) => {
                let unknown = Failure::from(status.clone()).reason == Reason::VmNotFound.code();
                if unknown && self.left().any(|one| one.goal == Goal::Gone) {
                    // The whole VM was forgotten meanwhile, which takes that its volumes are gone.
                    self.left().try_for_each(|one| one.look(None, shown))?;
                    return Ok(true);
                }
                return gone_or_failed(status);
            }
        };
        let mut list = Vec::new();
        while self.left().next().is_some() {
            let event = match stream.message().await {
                Ok(Some(message)) => message.event,
                Ok(None) => return Ok(false),
                Err(status) => return gone_or_failed(status),
            };
            match event {
                Some(Event::Snapshot(mut snapshot)) => {
                    list.append(&mut snapshot.volumes);
                    if snapshot.more {
                        continue;
                    }
                    for one in self.left() {
                        let found = list.iter().find(|volume| one.is(volume));
                        one.look(found.cloned(), shown)?;
                    }
                    list.clear();
                }
                Some(Event::Changed(volume)) => {
                    if let Some(one) = self.left().find(|one| one.is(&volume)) {
                        one.look(Some(volume), shown)?;
                    }
                }
                None => {}
            }
        }
        Ok(true)
    }
}

fn gone_or_failed(status: tonic::Status) -> Result<bool, Failure> {
    // A broken connection shows as Unknown or Cancelled as well, without our details.
    let failure = Failure::from(status);
    let gone = failure.exit == Exit::Unavailable
        || (failure.reason.is_empty() && matches!(failure.exit, Exit::Failed | Exit::Cancelled));
    if gone { Ok(false) } else { Err(failure) }
}

/// The phases as they come, with their times: lines, and below them, for a person, what goes on.
struct Shown<'a, 'b> {
    screen: &'a mut Screen<'b>,
    spinner: Option<ProgressBar>,
    start: Instant,
    /// There are several volumes: each line has its volume's name.
    named: bool,
}

impl<'a, 'b> Shown<'a, 'b> {
    fn new(screen: &'a mut Screen<'b>, named: bool) -> Self {
        let spinner = screen.live.then(|| {
            let style = ProgressStyle::with_template("{spinner} {elapsed} {msg}")
                .expect("the template is a constant");
            let spinner = ProgressBar::new_spinner().with_style(style);
            spinner.enable_steady_tick(Duration::from_millis(100));
            spinner
        });
        Self { screen, spinner, start: Instant::now(), named }
    }

    /// Shows a phase or a reason that is new.
    fn volume(&mut self, one: &mut One) -> Result<(), Failure> {
        let of = if self.named { format!("{}: ", one.name()) } else { String::new() };
        let volume = &one.last;
        for what in volume.gave_up.iter().skip(one.gave_up) {
            self.note(&format!("{of}gave up: {what}"))?;
        }
        one.gave_up = one.gave_up.max(volume.gave_up.len());
        if volume.vm_needs_hba && !one.told_hba {
            self.note(&format!("{of}{}", output::NEEDS_HBA))?;
        }
        one.told_hba |= volume.vm_needs_hba;
        let reason = volume.trouble.as_ref().map(|t| t.reason.clone()).unwrap_or_default();
        let now = (volume.phase(), reason);
        if one.shown.as_ref() == Some(&now) {
            return Ok(());
        }
        one.shown = Some(now);
        let mut line = format!("{of}{}", output::phase(volume.phase()));
        if let Some(device) = volume.device.as_ref().filter(|_| volume.trouble.is_none()) {
            let size = output::size(device.size_bytes);
            // A file has neither a number nor paths.
            line = match device.dev.as_str() {
                "" => format!("{line}  {} {size}", device.wwid),
                dev => format!("{line}  {dev} {} {size}, paths: {}", device.wwid, device.paths),
            };
        }
        if let Some(trouble) = &volume.trouble {
            line = format!("{line}  {}: {}", trouble.reason, trouble.message);
        }
        self.note(&line)
    }

    fn note(&mut self, text: &str) -> Result<(), Failure> {
        let text = output::clean(text);
        let line = format!("{:>8.2}s  {text}", self.start.elapsed().as_secs_f64());
        match &self.spinner {
            Some(spinner) => {
                spinner.println(line);
                spinner.set_message(text);
            }
            None => writeln!(self.screen.err, "{line}")?,
        }
        Ok(())
    }

    fn done(self) {
        if let Some(spinner) = self.spinner {
            spinner.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(phase: v1::Phase, trouble: Option<Reason>) -> v1::Volume {
        let mut volume = v1::Volume::default();
        volume.set_phase(phase);
        volume.trouble = trouble.map(|reason| v1::Trouble {
            reason: reason.code().into(),
            transient: reason.is_transient(),
            ..v1::Trouble::default()
        });
        volume
    }

    #[test]
    fn only_what_somebody_has_to_act_on_ends_a_wait_early() {
        use v1::Phase as P;
        let exit = |goal, volume: Option<v1::Volume>| match judge(goal, volume.as_ref()) {
            Verdict::Wait => None,
            Verdict::Reached => Some(Exit::Ok),
            Verdict::Failed(failure) => Some(failure.exit),
        };
        let (slow, refused) = (Some(Reason::PortalUnreachable), Some(Reason::LoginRefused));
        for (goal, volume, expected) in [
            (Goal::Ready, Some(volume(P::Pending, None)), None),
            (Goal::Ready, Some(volume(P::Pending, slow)), None),
            (Goal::Ready, Some(volume(P::Pending, refused)), Some(Exit::Precondition)),
            (Goal::Ready, Some(volume(P::Ready, None)), Some(Exit::Ok)),
            (Goal::Ready, Some(volume(P::Pending, Some(Reason::VmNotRunning))), Some(Exit::Ok)),
            (Goal::Ready, Some(volume(P::Detaching, None)), Some(Exit::Cancelled)),
            (Goal::Ready, None, Some(Exit::Cancelled)),
            (Goal::Gone, Some(volume(P::Ready, None)), None),
            (Goal::Gone, Some(volume(P::Detaching, Some(Reason::DetachUnacknowledged))), None),
            (
                Goal::Gone,
                Some(volume(P::Detaching, Some(Reason::InUseByGuest))),
                Some(Exit::Precondition),
            ),
            (Goal::Gone, Some(volume(P::Gone, Some(Reason::GuestUnproven))), Some(Exit::Ok)),
            (Goal::Gone, None, Some(Exit::Ok)),
        ] {
            assert_eq!(exit(goal, volume.clone()), expected, "{goal:?} {volume:?}");
        }
    }
}
