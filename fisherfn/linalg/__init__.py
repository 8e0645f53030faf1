"""Linear algebra on any function tree -> tree (`ff.linalg`): traces, spectra, solves."""

from fisherfn.linalg.cg import cg as cg
from fisherfn.linalg.hutchinson import hutchinson as hutchinson
from fisherfn.linalg.hutchpp import hutchpp as hutchpp
from fisherfn.linalg.lanczos import lanczos as lanczos
from fisherfn.linalg.lobpcg import lobpcg as lobpcg
from fisherfn.linalg.results import Eigenpairs as Eigenpairs
from fisherfn.linalg.results import Estimate as Estimate
from fisherfn.linalg.results import Solution as Solution
from fisherfn.linalg.slq import Density as Density
from fisherfn.linalg.slq import density as density
from fisherfn.linalg.slq import slq as slq
from fisherfn.linalg.xnystrace import xnystrace as xnystrace
from fisherfn.linalg.xtrace import xdiag as xdiag
from fisherfn.linalg.xtrace import xtrace as xtrace
