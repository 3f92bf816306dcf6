//! The targets of a volume's LUN, as this node comes to them.

use super::transport::Transport;
use crate::connector::lease::User;
use crate::types::Lun;

/// One of the targets at which a volume's LUN is to be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Access<T: Transport> {
    /// The target.
    pub(crate) target: T::Target,
    /// The routes to it that are wanted.
    pub(crate) routes: Vec<T::Route>,
    /// The LUN's number there.
    pub(crate) lun: Lun,
}

impl<T: Transport> Access<T> {
    /// What tells it from the others of the source: target and LUN, whatever the routes.
    pub(crate) fn key(&self) -> String {
        format!("{}/{}", self.target, self.lun)
    }

    /// The name of the target's lease.
    pub(crate) fn lease(&self) -> &str {
        self.target.as_ref()
    }
}

/// A route came up: it takes the place of a vaguer one that was asked for.
pub(super) fn note_route<T: Transport>(user: &mut User, asked: &[T::Route], came: T::Route) {
    let came_text = came.to_string();
    if user.routes.contains(&came_text) {
        return;
    }
    if let Some(vague) = asked.iter().find(|asked| T::covers(**asked, came)) {
        let vague = vague.to_string();
        user.routes.retain(|route| *route != vague);
    }
    user.routes.push(came_text);
}

/// How many routes there are to a LUN.
pub(super) fn ways<T: Transport>(targets: &[Access<T>]) -> usize {
    targets.iter().map(|t| t.routes.len()).sum()
}
