from .packing import cpu


class Packer:
    def __init__(self, layout, tensors):
        self.native, self.tensors = cpu.packer(layout), tensors

    def pack(self, buffer):
        self.native.pack(self.tensors, buffer)

    def unpack(self, buffer):
        self.native.unpack(self.tensors, buffer)


packer = Packer
