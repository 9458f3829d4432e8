import unittest

from sdist import load_mixins


load_mixins("test_modeling_common")

from test_nac_mixins import NACModelTester  # noqa: E402
from test_vmoe_mixins import VMoEModelTester  # noqa: E402
from testers import pipeline_mixin  # noqa: E402

from m2mkd import NACForImageClassification, VMoEForImageClassification  # noqa: E402


PipelineTesterMixin = pipeline_mixin(
    (VMoEForImageClassification, VMoEModelTester()), (NACForImageClassification, NACModelTester())
)


class VMoEPipelineTest(PipelineTesterMixin, unittest.TestCase):
    pipeline_model_mapping = {"image-classification": VMoEForImageClassification}


class NACPipelineTest(PipelineTesterMixin, unittest.TestCase):
    pipeline_model_mapping = {"image-classification": NACForImageClassification}
